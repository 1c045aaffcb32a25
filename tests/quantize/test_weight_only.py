"""Weights on grids without data."""

import pytest
import torch
from torch import nn

from multum.errors import StepError
from multum.graph import layers
from multum.graph.file import to_data
from multum.graph.layers import QUANTIZERS
from multum.graph.model import read
from multum.quantize import WeightOnly
from multum.step import compress
from multum.task import Task


def task(*modules: nn.Module, shape: tuple[int, ...] = (3, 8, 8)) -> Task:
    return Task(nn.Sequential(*modules), torch.randn(2, *shape))


def test_the_integers_by_hand() -> None:
    made = task(nn.Linear(3, 2, bias=False), shape=(3,))
    with torch.no_grad():
        made.model[0].weight.copy_(torch.tensor([[1.27, -0.635, 0.004], [0.0, 2.54, -0.05]]))
    _, tensors = to_data(compress(made, WeightOnly()).graph)
    assert tensors["0.weight"].tolist() == [[127, -64, 0], [0, 127, -2]]  # -63.5 and -2.5 go to the even integer
    assert tensors["0.weight_scale"].tolist() == pytest.approx([0.01, 0.02])
    assert tensors["0.weight"].dtype == torch.int8


def test_only_weights_change() -> None:
    graph = compress(task(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), WeightOnly()).graph
    assert len(graph.find(*QUANTIZERS)) == 2
    assert all(layer.quantizer() is not None for layer in layers(graph))


@pytest.mark.parametrize(
    ("bits", "edges", "expected"), [(8, 8, [127, 127, 127]), (4, 8, [127, 7, 127]), (3, 2, [3, 3, 3]), (2, 4, [7, 1, 7])]
)
def test_bits_and_edges(bits: int, edges: int, expected: list[int]) -> None:
    graph = compress(task(*[nn.Conv2d(3, 3, 1) for _ in range(3)]), WeightOnly(bits=bits, edges=edges)).graph
    assert [read(layer.quantizer(), "quant_max") for layer in layers(graph)] == expected


def test_norms_stay_for_the_training_that_follows() -> None:
    graph = compress(task(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), WeightOnly()).graph
    assert [layer.kind for layer in layers(graph)] == ["conv", "norm"]


def test_fewer_bits_lose_more() -> None:
    made, x = task(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3)), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        errors = [float((compress(made, WeightOnly(bits=b, edges=2)).graph(x) - made.original(x)).norm()) for b in (8, 6, 4, 2)]
    assert errors == sorted(errors)
    assert errors[0] < 0.02 * errors[-1]


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 9}, {"edges": 1}], ids=str)
def test_options_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(StepError, match="2 to 8"):
        WeightOnly(**options)
