"""Two layers for one: exact where the weight has a low rank, cheaper always, as good as a budget allows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from multum import Task, capture
from multum.errors import StepError
from multum.factorize import CP, SVD, Spatial, TensorTrain, Tucker
from multum.factorize.ranks import by_budget, by_energy, one, two
from multum.graph import layers
from multum.quantize import WeightOnly
from multum.step import compress


def thin(module: nn.Module, rank: int) -> nn.Module:
    """The module with a weight of this rank."""
    matrix = module.weight.data.flatten(1)
    module.weight.data = (torch.randn(matrix.shape[0], rank) @ torch.randn(rank, matrix.shape[1])).view_as(module.weight)
    return module


@pytest.mark.parametrize(
    ("module", "example"),
    [
        (nn.Linear(20, 30), torch.randn(2, 4, 20)),
        (nn.Linear(20, 30, bias=False), torch.randn(2, 20)),
        (nn.Conv1d(8, 16, 5, stride=2, padding=1), torch.randn(2, 8, 20)),
        (nn.Conv2d(8, 16, 3, stride=2, padding=1, dilation=2), torch.randn(2, 8, 9, 9)),
        (nn.Conv2d(8, 16, 3, padding="same"), torch.randn(2, 8, 9, 9)),
        (nn.Conv3d(4, 16, 3, bias=False), torch.randn(2, 4, 4, 4, 4)),
        (nn.Embedding(40, 12), torch.randint(0, 40, (2, 7))),
    ],
)
def test_a_weight_of_rank_two_becomes_two_layers_that_compute_the_same(module, example):
    torch.manual_seed(0)
    task = Task(nn.Sequential(thin(module, 2)).eval(), example)
    result = compress(task, SVD(energy=0.999999))
    assert [change["rank"] for change in result.records[0].changes.values()] == [2]
    assert [layer.name for layer in layers(result.graph)] == ["0.factor0", "0.factor1"]
    expected = task.original(example)
    torch.testing.assert_close(result.graph(example), expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max()))
    assert result.records[0].parameters[1] < result.records[0].parameters[0]


class Written(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.v, self.bias = (
            nn.Parameter(torch.randn(20, 2) @ torch.randn(2, 30)),
            nn.Parameter(torch.randn(30, 3)),
            nn.Parameter(torch.randn(30)),
        )

    def forward(self, x):
        return torch.addmm(self.bias, x, self.w) @ self.v


def test_products_written_out_are_layers_too():
    task = Task(Written(), torch.randn(2, 20))
    graph = compress(task, SVD(energy=0.9999, include="w")).graph
    assert [layer.name for layer in layers(graph)] == ["w_.factor0", "w_.factor1", "v"]
    torch.testing.assert_close(graph(task.example), task.original(task.example), rtol=1e-4, atol=1e-4)


def test_what_does_not_pay_stays_with_the_reason():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ConvTranspose2d(8, 8, 2), nn.Flatten(), nn.Linear(200, 8), shared, shared)
    with torch.no_grad():
        model[3].weight[:] = nn.init.orthogonal_(torch.empty(8, 200))
    plan = SVD(energy=0.99).plan(capture(model, torch.randn(2, 4, 6, 6)), None)
    assert not plan.changes
    reasons = [plan.skipped[name] for name in ("0", "1", "3", "4")]
    assert reasons[:2] == ["it has groups", "it is a transposed convolution"]
    assert reasons[2] == "at the rank that keeps so much energy, 8, the factors cost no less"
    assert reasons[3] == "it shares its weight"


@pytest.mark.parametrize("share", [0.7, 0.4])
@pytest.mark.parametrize("kind", ["macs", "parameters"])
def test_a_budget_is_kept_and_what_follows_still_works(kind, share):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(32 * 16, 40))
    task = Task(model, torch.randn(2, 8, 8, 8))
    result = compress(task, [SVD(**{kind: share}), WeightOnly()])
    weights = {name: [9 * 8 * 32, 9 * 32 * 32, 512 * 40][place] for place, name in enumerate(("0", "2", "4"))}
    places = {"0": 36, "2": 16, "4": 1} if kind == "macs" else dict.fromkeys("024", 1)
    left = {layer.name: result.graph.tensor(layer.weight).numel() * places[layer.name[0]] for layer in layers(result.graph)}
    whole = sum(weights[name] * places[name] for name in weights)
    assert 0.85 * share * whole < sum(left.values()) <= share * whole
    for name, change in result.records[0].changes.items():
        assert change[kind][0] == weights[name] * places[name]
        assert change[kind][1] < change[kind][0]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(2, 12), st.integers(2, 12)), min_size=1, max_size=3), st.floats(0.55, 0.95), st.integers(0, 99))
def test_no_single_step_to_another_rank_is_better_within_the_budget(sizes, share, seed):
    generator = torch.Generator().manual_seed(seed)
    curves = {}
    for place, (rows, columns) in enumerate(sizes):
        energy = torch.rand(min(rows, columns), generator=generator, dtype=torch.double).sort(descending=True).values
        if place % 2:
            curves[str(place)] = two([energy, energy.square()], rows * columns * 9, (columns, 9, rows))
        else:
            curves[str(place)] = one(energy, rows * columns, rows + columns)
    whole = sum(curve.whole for curve in curves.values())
    if sum(curve.least for curve in curves.values()) > share * whole:
        with pytest.raises(StepError, match="out of reach"):
            by_budget(curves, share)
        return
    ranks = by_budget(curves, share)

    def cost(chosen):
        return sum(float(curve.costs[chosen[name]]) if name in chosen else curve.whole for name, curve in curves.items())

    def loss(chosen):
        return sum(float(curves[name].lost[choice]) for name, choice in chosen.items())

    assert cost(ranks) <= share * whole
    for name, curve in curves.items():  # at this cost or less, nothing loses less
        for choice in range(len(curve.ranks)):
            other = ranks | {name: choice}
            assert loss(other) >= loss(ranks) - 1e-9 or cost(other) > cost(ranks)


def test_energy_is_kept():
    curve = one(torch.tensor([8.0, 1.0, 1.0]), 100, 1)
    assert [curve.rank(by_energy(curve, share)) for share in (0.5, 0.8, 0.85, 0.95)] == [[1], [1], [2], [3]]
    pair = two([torch.tensor([8.0, 2.0]), torch.tensor([6.0, 4.0])], 100, (1, 10, 1))
    assert [pair.rank(by_energy(pair, share)) for share in (0.3, 0.5, 0.7, 0.9)] == [[1, 1], [1, 2], [1, 2], [2, 2]]


@pytest.mark.parametrize("options", [{"energy": 0}, {"energy": 1.0}, {"macs": 1.5}, {"macs": 0.5, "parameters": 0.5}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(StepError):
        SVD(**options)


class Looked(nn.Module):
    """Sums of looked-up rows, of which the second half of the entries counts for little."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(60, 16), nn.Linear(16, 4, bias=False)
        self.head.weight.data[:, 8:] *= 0.01

    def forward(self, x):
        return self.head(self.table(x).sum(1))


def test_rows_count_by_how_often_they_are_looked_up_and_errors_by_what_they_cost():
    batches = [(torch.randint(0, 8, (64, 5), generator=torch.Generator().manual_seed(s)), torch.zeros(64)) for s in range(2)]
    task = Task(Looked().eval(), batches[0][0][:2], train=batches)
    wanted, off = task.original(batches[0][0]), []
    for options in ({"samples": 0}, {}, {"weighting": "outputs"}):
        graph = compress(task, SVD(rank=4, include="table", **options)).graph
        off.append(float(((graph(batches[0][0]) - wanted).norm() / wanted.norm()).detach()))
    assert off[1] < 0.8 * off[0]  # 8 of 60 rows are met
    assert off[2] < 0.3 * off[1]  # four of 16 directions are all that the outputs see


@pytest.mark.parametrize("step", [SVD, Spatial, Tucker, CP])
def test_what_errors_cost_the_outputs_counts_for_every_chain(step):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 24, 3), nn.Conv2d(24, 6, 1))
    model[1].weight.data[:, 4:] *= 0.03
    batches = [(torch.randn(16, 8, 8, 8), torch.zeros(16))] * 2
    task, off = Task(model.eval(), batches[0][0][:2], calibration=batches), []
    wanted = task.original(batches[0][0])
    for weighting in ("inputs", "outputs"):
        graph = compress(task, step(parameters=0.4, include="0", weighting=weighting)).graph
        off.append(float(((graph(batches[0][0]) - wanted).norm() / wanted.norm()).detach()))
    assert off[1] < 0.7 * off[0]


def test_a_train_knows_nothing_of_outputs():
    with pytest.raises(StepError, match="a train is nearest to its weight alone"):
        TensorTrain(weighting="outputs")
