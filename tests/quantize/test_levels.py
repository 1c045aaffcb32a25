"""Integers chosen for the coder: what they cost is what they are said to, and for the same bytes they disturb the outputs far less."""

import math

import pytest
import torch
from torch import nn

import multum
from multum.errors import StepError
from multum.graph import layers
from multum.pack import sizes
from multum.quantize import RateDistortion
from multum.quantize.levels import Rows, contexts, sensitivities


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.wide, self.norm2 = nn.Conv2d(16, 64, 3, padding=1), nn.BatchNorm2d(64, affine=False)
        self.depth, self.head = nn.Conv2d(64, 64, 3, groups=64), nn.Linear(64, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.norm2(self.wide(x)))
        return self.head(torch.relu(self.depth(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def task() -> multum.Task:
    torch.manual_seed(0)
    net = Net()
    smooth = nn.AvgPool2d(3, 1, 1)
    batches = [(smooth(torch.randn(32, 3, 12, 12)), torch.zeros(32, dtype=torch.int64)) for _ in range(6)]
    net.train()
    with torch.no_grad():
        for _ in range(30):
            net(batches[0][0])
    return multum.Task(net.eval(), batches[0][0][:2], calibration=batches[:4], test=batches[4:])


def error(task: multum.Task, graph: multum.Graph) -> float:
    x = torch.cat([x for x, _ in task.test])
    with torch.no_grad():
        wanted, found = task.original(x), graph(x)
    return float((wanted - found).square().mean() / wanted.var(0).mean())


@pytest.mark.parametrize("bits", [2.5, 1.3])
def test_the_outputs_err_far_less_at_the_same_size(task, tmp_path, bits):
    errors, bytes_ = {}, {}
    for rounding in ("nearest", "coded"):
        graph = multum.compress(task, RateDistortion(bits=bits, edges=2, rounding=rounding)).graph
        errors[rounding] = error(task, graph)
        multum.save(graph, tmp_path / "x.mip")
        bytes_[rounding] = sum(sizes(tmp_path / "x.mip")[layer.weight] for layer in layers(graph) if layer.kind != "norm")
    assert bytes_["coded"] < 1.1 * bytes_["nearest"]
    assert errors["coded"] < 0.5 * errors["nearest"]


def test_the_bits_that_are_told_are_those_in_the_file(task, tmp_path):
    result = multum.compress(task, RateDistortion(bits=2.0))
    told = result.records[0].measured["bits"]
    assert told == pytest.approx(2.0, rel=0.1)
    multum.save(result.graph, tmp_path / "x.mip")
    names = [layer.weight for layer in layers(result.graph) if layer.kind != "norm"]
    size = sum(sizes(tmp_path / "x.mip")[name] for name in names)
    assert 8 * size / sum(result.graph.tensor(name).numel() for name in names) == pytest.approx(told, rel=0.15)


def test_bits_are_those_of_a_code():
    """Kraft's inequality: a code with these lengths exists in every context."""
    q = torch.distributions.Laplace(0.0, 1.5).sample([2, 20, 45]).round()
    where, table = contexts(q, 9)
    assert where.shape == q.shape
    signs = torch.tensor([1.0] + [2.0] * (table.shape[1] - 1))
    assert ((signs * 2.0**-table).sum(1) <= 1 + 1e-4).all()


def test_a_channel_that_is_larger_is_another_context():
    scale = torch.tensor([0.3, 4.0]).repeat(20)[None, :, None]
    q = (torch.randn(1, 40, 90) * scale).round()
    where, _ = contexts(q, 9)
    assert (where[:, ::2].amax() < where[:, 1::2].amin()).item()


def test_more_is_paid_for_what_matters_more():
    torch.manual_seed(0)
    w, gain = torch.randn(1, 40, 32), torch.ones(1, 40)
    gain[:, ::2] = 100
    q, bits = Rows(w, torch.eye(32)[None], gain, 1).choose(0.5, 10.0)
    assert bits > 0
    zeros = (q == 0).float().mean(-1)[0]
    assert zeros[1::2].mean() > 0.2 + zeros[::2].mean()


def test_sensitivities_are_those_of_a_linear_network():
    """The outputs are linear in those of a layer: squares of the columns, over the squares of the outputs."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 3, bias=False))
    x = torch.randn(512, 5)
    task = multum.Task(net, x[:2], calibration=[(x, x)])
    found = sensitivities(task.original, layers(task.original), task, 512)
    square = net(x).square().mean()
    assert torch.allclose(found["0.weight"] / 512, net[1].weight.square().sum(0) / square, rtol=0.3)
    assert torch.allclose(found["1.weight"] / 512, torch.full([3], 1 / square.item()), rtol=1e-3)


def test_zeros_that_are_meant_stay(task):
    graph = multum.compress(task, [multum.prune.Weights(ratio=0.5, recover=False), RateDistortion(bits=2.0)]).graph
    pruned = multum.compress(task, multum.prune.Weights(ratio=0.5, recover=False)).graph
    for layer in layers(pruned):
        if layer.weight in pruned.sparse:
            assert (graph.tensor(layer.weight)[pruned.tensor(layer.weight) == 0] == 0).all()


def test_without_data_weights_go_to_the_nearest(task):
    blind = multum.Task(task.original, task.example)
    assert multum.compress(blind, RateDistortion()).records[0].measured == {}
    with pytest.raises(StepError, match="looks at data"):
        multum.compress(blind, RateDistortion(rounding="coded"))
    with pytest.raises(StepError, match="one of auto, nearest, coded"):
        RateDistortion(rounding="best")


def test_means_are_given_back(task):
    """A normalization behind a layer takes up what the layer lost, without a new tensor."""
    graph = multum.compress(task, RateDistortion(bits=1.0)).graph
    assert {name for name, _ in graph.named_tensors() if "scale" not in name and "zero" not in name} == {
        name for name, _ in task.original.named_tensors()
    }
    x = torch.cat([x for x, _ in task.test])
    with torch.no_grad():
        shift = (graph(x).mean(0) - task.original(x).mean(0)).square().mean() / task.original(x).var(0).mean()
    assert shift < 0.1
    assert math.isfinite(error(task, graph))
