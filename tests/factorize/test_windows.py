"""Spatial and Tucker: exact where the weight has the ranks, nearer with data, and what is not for them."""

import pytest
import torch
from torch import nn

from multum import Task, compress
from multum.factorize import SVD, Spatial, Tucker
from multum.graph import layers
from multum.quantize import Static


def of_ranks(module: nn.Module, ranks: tuple[int, ...]) -> nn.Module:
    """The convolution with a weight that has exactly these ranks."""
    o, i, *window = module.weight.shape
    torch.manual_seed(0)
    if len(ranks) == 1:
        value = torch.einsum("orq,rip->oipq", torch.randn(o, ranks[0], window[1]), torch.randn(ranks[0], i, window[0]))
    else:
        core = torch.randn(ranks[1], ranks[0], module.weight[0, 0].numel())
        value = torch.einsum("os,srk,ri->oik", torch.randn(o, ranks[1]), core, torch.randn(ranks[0], i)).reshape(module.weight.shape)
    module.weight.data = value
    return module


CONVOLUTIONS = [
    (nn.Conv2d(8, 16, 3, stride=2, padding=1, dilation=2), torch.randn(2, 8, 9, 9)),
    (nn.Conv2d(8, 16, (3, 5), stride=(1, 2), padding=(1, 2), bias=False), torch.randn(2, 8, 9, 11)),
    (nn.Conv2d(8, 16, 3, padding="same"), torch.randn(2, 8, 9, 9)),
]


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize(("module", "example"), CONVOLUTIONS)
@pytest.mark.parametrize(("step", "ranks"), [(Spatial, (2,)), (Tucker, (3, 2))])
def test_a_weight_of_these_ranks_becomes_layers_that_compute_the_same(step, ranks, module, example, data):
    calibration = [(example, torch.zeros(2))] * 2 if data else None
    task = Task(nn.Sequential(of_ranks(module, ranks)).eval(), example, calibration=calibration)
    result = compress(task, step(energy=1 - 1e-9))
    (change,) = result.records[0].changes.values()
    assert change["rank"] == (ranks[0] if len(ranks) == 1 else list(ranks))
    assert len(layers(result.graph)) == len(ranks) + 1
    expected = task.original(example)
    torch.testing.assert_close(result.graph(example), expected, rtol=1e-3, atol=1e-4 * float(expected.detach().abs().max()))
    assert result.records[0].parameters[1] < result.records[0].parameters[0]
    larger = torch.cat([example, example])
    torch.testing.assert_close(result.graph(larger), task.original(larger), rtol=1e-3, atol=1e-4 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("dimensions", [1, 3])
def test_tucker_takes_windows_of_any_number_of_dimensions(dimensions):
    module = getattr(nn, f"Conv{dimensions}d")(6, 12, 3, padding=1)
    example = torch.randn(2, 6, *[5] * dimensions)
    task = Task(nn.Sequential(of_ranks(module, (2, 2))).eval(), example)
    torch.testing.assert_close(compress(task, Tucker(energy=1 - 1e-9)).graph(example), task.original(example), rtol=1e-3, atol=1e-3)
    assert Spatial().plan(task.original, task).skipped == {"0": "its window is not two-dimensional"}


@pytest.mark.parametrize("step", [SVD, Spatial, Tucker])
def test_data_bring_the_outputs_nearer_at_equal_cost(step):
    torch.manual_seed(0)
    mix = torch.randn(12, 12) * torch.logspace(1, -1, 12)  # channels that are alike, and of very different size
    batches = [(torch.einsum("ij,njhw->nihw", mix, torch.randn(16, 12, 8, 8)), torch.zeros(16)) for _ in range(3)]
    task = Task(nn.Sequential(nn.Conv2d(12, 24, 3, padding=1)), batches[0][0][:2], calibration=batches[:2])
    off = []
    for samples in (0, 32):
        graph = compress(task, step(macs=0.4, samples=samples)).graph
        wanted = task.original(batches[2][0])
        off.append(float((graph(batches[2][0]) - wanted).square().mean() / wanted.var()))
    assert off[1] < 0.7 * off[0]


@pytest.mark.parametrize("step", [Spatial, Tucker])
def test_a_budget_is_kept_and_what_follows_works(step):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, stride=2), nn.ReLU(), nn.Conv2d(32, 8, 1))
    batches = [(torch.randn(8, 8, 10, 10), torch.zeros(8))] * 2
    task = Task(model, batches[0][0][:2], calibration=batches)
    result = compress(task, [step(macs=0.5), Static()])
    changes, skipped = result.records[0].changes, result.records[0].skipped
    whole = 8 * 32 * 9 * 100 + 32 * 32 * 9 * 16
    left = whole + sum(change["macs"][1] - change["macs"][0] for change in changes.values())
    assert 0.3 * whole < left <= 0.5 * whole
    assert "4" in skipped
    assert result.graph(batches[0][0]).shape == (8, 8, 4, 4)


def test_groups_and_points_are_not_for_them():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 8, 3))
    task = Task(model, torch.randn(2, 8, 8, 8))
    assert Tucker().plan(task.original, task).skipped == {
        "0": "it has groups",
        "1": "its window is a point: factorize.SVD is for that",
        "2": "it is a transposed convolution",
    }
