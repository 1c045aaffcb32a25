"""Training that knows of the grids of weights and activations."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from multum.errors import StepError
from multum.graph import layers
from multum.graph.file import from_data, to_data
from multum.graph.layers import QUANTIZERS, source
from multum.graph.model import aten, read
from multum.quantize import Aware, Static
from multum.step import compress
from multum.task import Task


def rings() -> Task:
    """Points in the plane, inside or outside of a circle; a network with batch normalization that was trained on them."""
    torch.manual_seed(0)
    x = torch.randn(1024, 2)
    y = (x.norm(dim=1) > 1.2).long()
    body = [nn.Linear(2, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 2)]
    model = nn.Sequential(*body)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(80):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    batches = [(x[i : i + 64], y[i : i + 64]) for i in range(0, 1024, 64)]
    return Task(model.eval(), x[:2], train=batches, calibration=batches[:4], loss=F.cross_entropy)


def error(graph: object, task: Task) -> float:
    x = torch.cat([x for x, _ in task.train])
    with torch.no_grad():
        return float((graph(x).softmax(1) - task.original(x).softmax(1)).abs().mean())


def test_training_gives_back_what_two_bits_take() -> None:
    task, options = rings(), {"weight_bits": 2, "activation_bits": 2, "edges": 4}
    start = compress(task, Aware(**options, epochs=1e-9, learning_rate=1e-12)).graph
    trained = compress(task, Aware(**options, epochs=20.0, learning_rate=1e-2))
    assert error(trained.graph, task) < 0.65 * error(start, task)
    (record,) = trained.records
    assert record.measured["loss_last"] < record.measured["loss_first"]


@pytest.mark.parametrize("ranges", ["lsq", "pact", "fixed"])
def test_what_is_left_are_integers_and_plain_scales(ranges: str) -> None:
    graph = compress(rings(), Aware(weight_bits=3, activation_bits=3, edges=4, ranges=ranges)).graph
    assert [layer.kind for layer in layers(graph)] == ["linear"] * 3  # batch normalization is folded
    assert not graph.find(aten.minimum.default, aten._fake_quantize_learnable_per_tensor_affine.default)
    values = [node for node in graph.find(*QUANTIZERS) if source(node) is None]
    assert [(read(node, "quant_min"), read(node, "quant_max")) for node in values] == [(-7, 7), (0, 7), (0, 15)]
    data, tensors = to_data(graph)
    assert sorted(data["integers"]) == sorted(layer.weight for layer in layers(graph))
    assert [int(tensors[layer.weight].abs().max()) for layer in layers(graph)] == [7, 3, 7]
    x = torch.randn(8, 2)
    with torch.no_grad():
        assert torch.equal(from_data(data, tensors)(x), graph(x))


def test_a_scale_that_learns_moves_and_one_that_is_fixed_stays() -> None:
    task = rings()
    before = {
        entry["value"]: entry["scale"]
        for change in Aware().plan(task.original.copy(), task).changes.values()
        for entry in [change["input"]]
    }
    for ranges, moves in (("lsq", True), ("pact", True), ("fixed", False)):
        graph = compress(task, Aware(ranges=ranges, learning_rate=1e-2)).graph
        after = {name: float(graph.tensor(f"activations.{name}.scale")) for name in before}
        assert any(abs(after[name] / before[name] - 1) > 1e-3 for name in before) == moves, ranges


def test_activations_are_quantized_once() -> None:
    with pytest.raises(StepError, match="quantized already"):
        compress(rings(), [Static(), Aware()])


@pytest.mark.parametrize(
    "options", [{"weight_bits": 1}, {"activation_bits": 9}, {"ranges": "learned"}, {"samples": 0}, {"epochs": 0}], ids=str
)
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(StepError):
        Aware(**options)
