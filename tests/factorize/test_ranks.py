"""Ranks: told, told from noise, by what the outputs lose, by times."""

import pytest
import torch
from torch import nn

from multum import Task, compress
from multum.analyze.latency import chains
from multum.errors import StepError
from multum.factorize import CP, SVD, Spatial, TensorTrain, Tucker, timing, vbmf
from multum.factorize.timing import Clock
from multum.graph import layers


@pytest.mark.parametrize(("rows", "columns", "rank"), [(50, 80, 5), (64, 300, 10), (300, 64, 10), (100, 100, 8), (40, 200, 0)])
@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_the_rank_that_stands_out_of_noise(rows, columns, rank, noise):
    random = torch.Generator().manual_seed(rows)
    matrix = torch.randn(rows, rank, generator=random) @ torch.randn(rank, columns, generator=random)
    assert vbmf.rank(matrix + noise * torch.randn(rows, columns, generator=random)) == rank


def test_a_matrix_without_noise_has_its_rank():
    assert vbmf.rank(torch.randn(20, 3) @ torch.randn(3, 30)) == 3
    assert vbmf.rank(torch.zeros(4, 5)) == 0


@pytest.mark.parametrize(("step", "rank"), [(SVD, 3), (Spatial, 3), (Tucker, [3, 3]), (CP, 3), (TensorTrain, [3, 3])])
def test_vbmf_chooses_the_ranks_of_every_method(step, rank):
    torch.manual_seed(0)
    module, x = (nn.Linear(64, 64), torch.randn(2, 64)) if step is TensorTrain else (nn.Conv2d(16, 32, 3), torch.randn(2, 16, 8, 8))
    layer, weight = layers(Task(nn.Sequential(module), x).original)[0], torch.randn(module.weight.shape).double()
    made = step(rank=3).dense(layer, weight, None, rank if isinstance(rank, list) else [rank])
    module.weight.data = (made / made.std() + 0.02 * torch.randn(made.shape)).float()
    found = compress(Task(nn.Sequential(module), x), step(rank="vbmf")).records[0].changes["0"]["rank"]
    assert found == rank


def test_ranks_that_are_told_are_taken():
    task = Task(nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 16, 3)), torch.randn(2, 16, 8, 8))
    assert [c["rank"] for c in compress(task, Tucker(rank=(5, 7))).records[0].changes.values()] == [[5, 7]] * 2
    assert [c["rank"] for c in compress(task, SVD(rank=4)).records[0].changes.values()] == [4, 4]


def test_ranks_above_full_or_below_one_are_refused():
    task = Task(nn.Sequential(nn.Conv2d(16, 32, 3)), torch.randn(2, 16, 8, 8))
    for step, full in ((SVD(rank=33), "32"), (Tucker(rank=(17, 4)), r"\[16, 32\]"), (Tucker(rank=(1, 2, 3)), ""), (CP(rank=145), "144")):
        with pytest.raises(StepError, match=f"rank is .*, and the layer '0' has the full rank {full}"):
            compress(task, step)
    for options, text in (
        ({"rank": 0}, "rank is 0"),
        ({"rank": (3, -1)}, "rank is"),
        ({"rank": "best"}, "'best'"),
        ({"rank": 3, "macs": 0.5}, "rank and macs are both given"),
        ({"latency": 1.2}, "latency is 1.2"),
        ({"loss": "weights"}, "loss is 'weights'"),
    ):
        with pytest.raises(StepError, match=text):
            Tucker(**options)


class Unequal(nn.Module):
    """Two layers of the same shape, of which one counts a hundred times as much."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + 0.01 * self.b(x)


def test_what_the_outputs_lose_is_measured():
    batches = [(torch.randn(64, 32), torch.zeros(64))]
    task = Task(Unequal(), batches[0][0][:2], calibration=batches)
    alike, measured = (compress(task, SVD(parameters=0.6, loss=loss)) for loss in ("energy", "outputs"))
    assert set(measured.records[0].changes) == {"b"}
    assert measured.records[0].changes["b"]["outputs"] < 1e-3
    x = batches[0][0]
    off = [float((result.graph(x) - task.original(x)).norm().detach()) for result in (alike, measured)]
    assert off[1] < 0.1 * off[0]
    with pytest.raises(StepError, match="needs `calibration`"):
        compress(Task(Unequal(), torch.randn(2, 32)), SVD(parameters=0.6, loss="outputs"))


def counted(given, which, threads=1):
    """Instead of a clock: one for every weight, and a thousand for every operator."""
    return tuple(float(sum(1000 + timing.np.prod(part[1] if part[0] == "conv" else part[1:]) for part in parts)) for parts in which)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 16, 3), nn.Conv2d(16, 64, 3), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(256, 100), nn.Linear(100, 10)
    )


@pytest.mark.parametrize("step", [SVD, Tucker, CP])
def test_a_budget_of_time_is_kept_and_what_is_not_faster_stays(monkeypatch, step):
    monkeypatch.setattr(timing, "chains", counted)
    task = Task(model(), torch.randn(2, 8, 8, 8))
    record = compress(task, step(latency=0.7)).records[0]
    own = {layer.name: 1000 + task.original.tensor(layer.weight).numel() for layer in layers(task.original) if layer.kind in step.kinds}
    left = sum(record.changes[name]["ms"][1] if name in record.changes else time for name, time in own.items())
    assert 0.4 * sum(own.values()) < left <= 0.7 * sum(own.values())
    for name, change in record.changes.items():
        assert change["ms"][0] == own[name] > change["ms"][1]
        assert change["latency"][1] == pytest.approx(change["ms"][1])
    assert "0" in record.skipped


def test_only_what_measures_faster_is_factorized_if_so_asked(monkeypatch):
    monkeypatch.setattr(timing, "chains", counted)
    task = Task(model(), torch.randn(2, 8, 8, 8))
    record = compress(task, SVD(rank=4, faster=True)).records[0]
    assert set(record.changes) == {"1", "2", "4"}
    assert record.skipped["0"] == "the chain takes 2352.000 ms, the layer 2152.000"
    assert "5" in record.skipped
    assert set(compress(task, SVD(rank=4)).records[0].changes) == {"0", "1", "2", "4", "5"}
    saved = compress(task, SVD(parameters=0.5, faster=True)).records[0]
    assert all(change["ms"][1] < change["ms"][0] for change in saved.changes.values())


@pytest.mark.parametrize("step", [SVD(), Spatial(), Tucker(), CP(parts=4), TensorTrain()])
def test_chains_of_every_method_run_in_the_engine(step):
    module, x = (
        (nn.Linear(64, 64), torch.randn(2, 3, 64)) if isinstance(step, TensorTrain) else (nn.Conv2d(8, 8, 3), torch.randn(2, 8, 8, 8))
    )
    graph = Task(nn.Sequential(module), x).original
    layer = layers(graph)[0]
    ranks = [2, 2] if isinstance(step, Tucker | TensorTrain) else [2]
    clock = Clock(graph, layer, lambda ranks: step._sketch(module.weight.detach().double(), layer, ranks))
    own, chain = clock.times(ranks)
    assert own > 0
    assert chain > 0
    assert chains.cache_info().currsize
