"""Replaced layers: every block in a graph, what it costs, budgets, training of the blocks, and what is refused."""

import pytest
import torch
from torch import nn

import multum
from multum import Task, compress
from multum.analyze import analyze
from multum.errors import StepError
from multum.lighten import Replace
from multum.lighten.fits import FITS
from multum.lighten.replace import within
from multum.prune.deviation import Deviation
from multum.quantize import Static


class Images(nn.Module):
    def __init__(self, window: int = 3, stride: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(8, 16, window, stride, window // 2, bias=False)
        self.norm, self.second = nn.BatchNorm2d(16), nn.Conv2d(16, 16, window, padding=window // 2)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.norm(self.first(x))))).mean((2, 3)))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((x + self.down(torch.relu(self.up(x)))).mean(1))


def images(seed: int, size: int = 12) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return nn.functional.avg_pool2d(torch.randn(32, 8, size + 2, size + 2, generator=random), 3, 1) * 3


def task(model: nn.Module, batches: list[torch.Tensor]) -> Task:
    data = [(x, torch.zeros(len(x), dtype=torch.long)) for x in batches]
    return Task(model.eval(), batches[0][:2], train=data, validation=data, loss=nn.functional.cross_entropy)


@pytest.mark.parametrize("kind", FITS)
def test_every_block_in_a_network_of_images(kind, tmp_path):
    window = 5 if kind in ("smaller", "dilated") else 3
    job = task(Images(window), [images(seed) for seed in (0, 1)])
    result = compress(job, Replace(by=kind, exclude="head", groups=2))
    change = result.records[0].changes["first"]
    before, after = (analyze(graph, job.example, latency=False).macs for graph in (job.original, result.graph))
    assert before - after == sum(change["macs"][0] - change["macs"][1] for change in result.records[0].changes.values())
    assert result.graph(images(2)).shape == (32, 4)
    multum.save(result, tmp_path / "model.mip", job)
    assert torch.equal(multum.load(tmp_path / "model.mip")(images(2)), result.graph(images(2)))
    multum.export(result.graph, tmp_path / "model.onnx")  # runs it and compares
    assert change["by"] == kind
    # what the plan says is lost is what the first layer's outputs are off by, about their means
    graph, node = result.graph, result.graph.find(torch.ops.aten.batch_norm.default)[0].args[0]
    graph.tap([node])
    graph(images(0))
    ours = graph.tapped[0].detach()
    theirs = job.model.first(images(0)).detach()
    graph.tap()
    spread = (theirs - theirs.mean((0, 2, 3), keepdim=True)).square().sum()
    assert float((ours - theirs).square().sum() / spread) == pytest.approx(change["lost"], rel=0.35, abs=0.02)


@pytest.mark.parametrize("kind", ["grouped", "shuffled", "low_rank"])
@pytest.mark.parametrize("positions", [True, False])
def test_linear_layers_of_sequences_and_of_rows(kind, positions, tmp_path):
    x = torch.randn(32, 6, 16)
    model = Words() if positions else nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    job = task(model, [x if positions else x[:, 0]])
    result = compress(job, Replace(by=kind, ratio=0.25, exclude="head" if positions else ()))
    assert len(result.records[0].changes) == 2
    parameters = result.records[0].parameters
    assert parameters[1] < parameters[0]
    multum.export(result.graph, tmp_path / "model.onnx")
    assert result.graph(x[:3] if positions else x[:3, 0]).shape == job.original(x[:3] if positions else x[:3, 0]).shape


def test_a_block_diagonal_layer_is_found_exactly():
    model = nn.Sequential(nn.Linear(16, 8))
    model[0].weight.data = torch.block_diag(*torch.randn(4, 2, 4))
    job = task(model, [torch.randn(64, 16)])
    result = compress(job, Replace(by="grouped"))
    torch.testing.assert_close(result.graph(job.example), job.original(job.example), rtol=1e-3, atol=1e-3)


def test_a_depthwise_layer_is_found_exactly_whatever_its_padding():
    for options in ({"padding": "same"}, {"padding": "valid"}, {"padding": 2, "dilation": 2}, {"stride": 2, "padding": 1}):
        model = nn.Sequential(nn.Conv2d(8, 16, 3, **options))
        model[0].weight.data = torch.einsum("oc,chw->ochw", torch.randn(16, 8), torch.randn(8, 3, 3))
        job = task(model, [images(0)])
        graph = compress(job, Replace()).graph
        torch.testing.assert_close(graph(images(1)), job.original(images(1)), rtol=1e-3, atol=2e-3)


def test_the_blocks_are_trained_toward_what_was_there():
    job = task(Images(), [images(seed) for seed in range(8)]).but(validation=None)

    def off(graph: multum.Graph) -> float:
        values = []
        for one, name in ((graph, "relu_1"), (job.original.copy(), "relu_1")):
            one.tap([node for node in one.fx.nodes if node.name == name])
            one(images(0))
            values.append(one.tapped[0].detach())
        return float((values[0] - values[1]).square().mean() / values[1].square().mean())

    before = compress(job, Replace(exclude="head"))
    after = compress(job, Replace(exclude="head", epochs=12.0, learning_rate=1e-2))
    assert off(after.graph) < 0.9 * off(before.graph)
    head = [graph.tensor("head.weight") for graph in (before.graph, after.graph)]
    assert torch.equal(head[0], head[1])  # only the blocks learned
    assert all(parameter.requires_grad for parameter in after.graph.parameters())
    assert after.records[0].measured["steps"] == 96


@pytest.mark.parametrize("kind", ["smaller", "dilated"])
def test_a_block_makes_good_what_those_before_it_lost(kind):
    model = Images(5, stride=1).train()
    with torch.no_grad():
        for seed in range(60):
            model(images(seed))
    job = task(model, [images(seed) for seed in range(8)])
    plain, made = (compress(job, Replace(by=kind, exclude="head", recover=recover)) for recover in (False, True))
    assert made.records[0].changes == plain.records[0].changes
    assert made.records[0].measured["recovery"] == "least squares"
    assert plain.records[0].measured == {}
    off = Deviation(job.original, [images(10), images(11)])
    assert off(made.graph) < 0.75 * off(plain.graph)


def test_a_budget_takes_what_loses_least_and_the_rest_stays():
    job = task(Images(), [images(0)])
    result = compress(job, Replace(by=("separable", "low_rank", "ghost"), macs=0.5))
    record = result.records[0]
    total = sum(change["macs"][0] for change in record.changes.values()) + sum(
        {"first": 8 * 16 * 9 * 36, "second": 16 * 16 * 9 * 36, "head": 64}[name] for name in record.skipped
    )
    kept = total - sum(change["macs"][0] - change["macs"][1] for change in record.changes.values())
    assert kept <= 0.5 * total
    assert compress(job, [Replace(by="separable", macs=0.5), Static()]).graph(images(1)).shape == (32, 4)


def test_one_price_for_all_by_hand():
    found = {
        "a": [{"by": "x", "macs": [100, 50], "lost": 0.1}, {"by": "y", "macs": [100, 10], "lost": 0.5}],
        "b": [{"by": "x", "macs": [100, 60], "lost": 0.3}],
    }
    whole = {"a": 100, "b": 100, "c": 200}
    assert {name: way["by"] for name, way in within(found, whole, 0.9).items()} == {"a": "x"}
    # at a price p of the whole: a -> y when 0.4 < 0.1 p, b -> x when 0.3 < 0.1 p
    assert {name: way["by"] for name, way in within(found, whole, 0.8).items()} == {"a": "x", "b": "x"}
    assert {name: way["by"] for name, way in within(found, whole, 0.7).items()} == {"a": "y", "b": "x"}
    assert {name: way["by"] for name, way in within(found, whole, 0.1).items()} == {"a": "y", "b": "x"}


def test_a_replacement_without_data_for_its_fit_is_refused():
    bare = Task(Images().eval(), images(0)[:2])
    with pytest.raises(StepError, match=r"lighten\.Replace needs `calibration`, which the task 'model' does not have"):
        compress(bare, Replace())
    with pytest.raises(StepError, match=r"lighten\.Replace needs `train`"):
        compress(Task(Images().eval(), images(0)[:2], calibration=[(images(0), torch.zeros(32))]), Replace(epochs=1.0))


def test_every_layer_that_stays_has_its_reason():
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 8, 1),
        nn.ConvTranspose2d(8, 8, 3),
        nn.Conv2d(8, 9, 3),
        nn.Conv2d(9, 9, 4, padding="same"),
    )
    first = task(nn.Sequential(nn.Conv2d(8, 3, 3, padding=1), nn.Conv2d(3, 16, 3)), [images(0)])
    reason = "filters for each of 3 input channels are too few for its 16 outputs"
    assert Replace(by="separable").plan(first.original, first).skipped == {"1": f"separable: {reason}"}
    assert "1" in Replace(by="separable", expansion=2).plan(first.original, first).changes
    job = task(model, [images(0)])
    assert Replace(by="separable").plan(job.original, job).skipped == {
        "0": "it has groups",
        "1": "separable: its window is a point",
        "2": "it is a transposed convolution",
        "4": "its arguments are not those of a plain layer",
    }
    skipped = (
        Replace(by=("ghost", "grouped", "smaller", "dilated", "bottleneck"), ratio=0.9, include="[13]").plan(job.original, job).skipped
    )
    assert skipped["3"] == (
        "ghost: half of its outputs is no whole number; grouped: its 8 inputs and 9 outputs do not divide into 4 groups; "
        "smaller: its window [3, 3] is not odd and wider than 3; dilated: its window [3, 3] is not odd and wider than 3; "
        "bottleneck: it would cost no less"
    )


@pytest.mark.parametrize(
    "options",
    [{"by": "seperable"}, {"groups": 1}, {"expansion": 0}, {"kernel": 2}, {"ratio": 1.0}, {"macs": 0.0}, {"epochs": -1.0}, {"samples": 0}],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(StepError, match=r"lighten\.Replace"):
        Replace(**options)
