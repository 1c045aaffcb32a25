"""Compound scaling: the three dimensions, their shares, the size of the image measured, and what cannot shrink."""

import math

import pytest
import torch
from torch import nn

import multum
from multum import Task, compress
from multum.analyze import analyze
from multum.errors import StepError
from multum.graph.model import aten
from multum.graph.residual import blocks
from multum.lighten import Scale
from multum.lighten.scale import resize, resolutions


class Images(nn.Module):
    """A stem, six residual blocks, a head that averages over places or, fixed, reads them all."""

    def __init__(self, fixed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.fixed = nn.Conv2d(3, 32, 3, 1, 1), fixed
        self.parts = nn.ModuleList(nn.Sequential(nn.ReLU(), nn.Conv2d(32, 64, 3, 1, 1), nn.ReLU(), nn.Conv2d(64, 32, 1)) for _ in range(6))
        self.head = nn.Linear(32 * 256 if fixed else 32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for part in self.parts:
            x = x + part(x)
        return self.head(x.flatten(1) if self.fixed else x.mean((2, 3)))


def task(model: nn.Module, **parts) -> Task:
    return Task(model.eval(), torch.randn(2, 3, 16, 16), **parts)


def test_each_dimension_shrinks_by_its_power_of_the_same_number(tmp_path):
    job = task(Images())
    result = compress(job, Scale(macs=0.4))
    changes, phi = result.records[0].changes, math.log(2.5) / math.log(1.2 * 1.1**2 * 1.15**2)
    assert changes["input"] == {"size": [round(16 * 1.15**-phi)] * 2, "of": [16, 16]}
    assert len(changes["depth"]["without"]) == round(6 * (1 - 1.2**-phi)) == 1
    assert len(blocks(result.graph)) == 5
    widths = {len(change["keep"]) / change["of"] for change in changes.values() if "keep" in change}
    assert all(abs(width - 1.1**-phi) < 0.13 for width in widths)
    left = analyze(result.graph, job.example, latency=False).macs / analyze(job.original, job.example, latency=False).macs
    assert 0.3 < left < 0.5
    assert result.records[0].measured["macs"] == pytest.approx(left)
    assert result.graph(torch.randn(5, 3, 16, 16)).shape == (5, 4)
    multum.save(result, tmp_path / "model.mip", job)
    assert torch.equal(multum.load(tmp_path / "model.mip")(job.example), result.graph(job.example))
    multum.export(result.graph, tmp_path / "model.onnx")


def test_what_cannot_shrink_leaves_its_share_to_the_others():
    job = task(Images(fixed=True))
    plan = Scale(macs=0.4).plan(job.original, job)
    assert "input" not in plan.changes
    assert "asks for" in plan.skipped["input"]
    job = task(nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)))
    plan = Scale(macs=0.25, resolution=1.0).plan(job.original, job)
    assert plan.skipped["depth"] == "there are no two residual blocks"
    assert {len(change["keep"]) for change in plan.changes.values()} == {16}  # half of the width is a quarter of the products


def test_the_resized_network_is_the_network_on_a_resized_image():
    job, x = task(Images()), torch.randn(3, 3, 16, 16)
    graph = job.original.copy()
    resize(graph, [11, 12])
    smaller = nn.functional.interpolate(x, (11, 12), mode="bilinear")
    torch.testing.assert_close(graph(x), job.model(smaller), rtol=1e-4, atol=1e-5)
    assert len(graph.find(aten.upsample_bilinear2d.default)) == 1


def score(predict, data) -> torch.Tensor:
    return torch.cat([-100.0 * (predict(x) - y).square().sum(1) for x, y in data])


def test_the_score_at_each_size_is_measured_and_bounds_the_size():
    model, x = Images().eval(), torch.randn(16, 3, 16, 16)
    data = [(x, model(x).detach())]
    job = task(model, validation=data, metric=score)
    found = resolutions(job.original, job, [[14, 14], [8, 8]])
    assert found[0] == ([16, 16], pytest.approx(0.0, abs=1e-6))
    assert [size for size, _ in found] == [[16, 16], [14, 14], [8, 8]]
    assert found[1][1] > found[2][1]
    options = {"macs": 0.3, "depth": 1.0, "width": 1.0}
    free = Scale(**options).plan(job.original, job).changes["input"]
    assert free["size"] == [9, 9]
    assert len(free["measured"]) == 5
    drops = {tuple(size): -value for size, value in free["measured"]}
    middle = free["measured"][2][0]
    held = Scale(**options, drop=1.001 * drops[tuple(middle)]).plan(job.original, job).changes["input"]
    assert held["size"] == min([list(size) for size, off in drops.items() if off <= 1.001 * drops[tuple(middle)]])
    assert "input" not in Scale(**options, drop=0.0).plan(job.original, job).changes


@pytest.mark.parametrize(
    "options", [{"macs": 1.0}, {"width": 0.9}, {"depth": 1.0, "width": 1.0, "resolution": 1.0}, {"drop": -1.0}], ids=str
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(StepError, match=r"lighten\.Scale"):
        Scale(**options)
    with pytest.raises(StepError, match="needs `validation`"):
        compress(task(Images()), Scale(drop=1.0))
