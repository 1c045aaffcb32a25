"""What the weights of a layer meet: the vectors of every kind of layer, and their moments over the data."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from multum.graph import Graph, capture, layers
from multum.quantize.moments import as_rows, from_rows, gather, vectors
from multum.task import Task

MANY = 1 << 20  # so few samples each that no position is left out


class Matmul(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.weight)


class Addmm(Matmul):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(torch.zeros(5), x, self.weight)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (6,)),
    "tokens": (lambda: nn.Linear(6, 5), (7, 6)),
    "matmul": (Matmul, (7, 6)),
    "addmm": (Addmm, (6,)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1), (4, 11)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 6, 7)),
    "strided": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 3), (1, 0)), (4, 8, 9)),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2), (4, 8, 9)),
    "same": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same"), (4, 6, 7)),
    "valid": (lambda: nn.Conv2d(4, 6, 2, padding="valid"), (4, 6, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 6, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (4, 6, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, 2), (2, 4, 5, 6)),
}


def captured(name: str) -> tuple[Graph, Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    x = torch.randn(3, *shape)
    return capture(make().eval(), x), x


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_vectors_are_the_outputs(name: str) -> None:
    graph, x = captured(name)
    (layer,) = layers(graph)
    rows = as_rows(graph.tensor(layer.weight).detach(), layer)
    with torch.no_grad():
        expected = graph(x) - (0 if layer.bias is None else bias_of(graph, layer, x))
    outputs = (rows @ vectors(x, layer, 1, 0).mT).flatten(0, 1)  # [outputs, n]
    channel = 1 if layer.kind == "conv" else -1
    assert torch.allclose(outputs, expected.movedim(channel, 0).flatten(1), atol=1e-5)


def bias_of(graph: Graph, layer: object, x: Tensor) -> Tensor:
    bias = graph.tensor(layer.bias).detach()
    return bias.reshape(-1, *[1] * (x.ndim - 2)) if layer.kind == "conv" else bias


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_has_a_row_for_each_entry_of_its_kernel(groups: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 6)
    graph = capture(nn.ConvTranspose2d(4, 6, 2, 2, bias=False, groups=groups).eval(), x)
    (layer,) = layers(graph)
    rows = as_rows(graph.tensor(layer.weight).detach(), layer)
    outputs = (rows @ vectors(x, layer, 1, 0).mT).reshape(6, 2, 2, 3, 5, 6)
    with torch.no_grad():
        assert torch.allclose(outputs.permute(3, 0, 4, 1, 5, 2).reshape(3, 6, 10, 12), graph(x), atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_rows_go_back_into_the_weight(name: str) -> None:
    graph, _ = captured(name)
    (layer,) = layers(graph)
    weight = graph.tensor(layer.weight).detach()
    assert torch.equal(from_rows(as_rows(weight, layer), layer, weight), weight)


def test_positions_are_left_out_evenly_and_others_in_the_next_batch() -> None:
    x = torch.arange(400.0).reshape(1, 1, 20, 20).expand(4, 1, 20, 20)
    graph = capture(nn.Conv2d(1, 1, 1).eval(), x)
    (layer,) = layers(graph)
    first, second = (vectors(x, layer, 4096 // 24, turn).reshape(4, -1) for turn in (0, 1))  # 24 positions of 400 suffice
    assert first.shape == (4, 25)
    assert first[0, :6].tolist() == [0, 4, 8, 12, 16, 80]
    assert second[0, :6].tolist() == [21, 25, 29, 33, 37, 101]


def twins(model: nn.Module, batches: list[Tensor]) -> tuple[Graph, Graph, Task]:
    task = Task(model, batches[0], calibration=[(x, 0) for x in batches])
    return task.original.copy(), task.original.copy(), task


def test_the_moments_by_definition() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(8, 6) + 1 for _ in range(3)]
    graph, original, task = twins(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), batches)
    graph.tensor("0.weight").data += 0.1
    pair = [(a, b) for a, b in zip(layers(graph), layers(original), strict=True) if a.name == "2"]
    (moments,) = gather(graph, original, pair, task, 24).values()
    with torch.no_grad():
        x0, x = (torch.tanh(torch.cat(batches) @ g.tensor("0.weight").T + g.tensor("0.bias")) for g in (original, graph))
    second, cross = moments.matrices(centred=False)
    assert moments.count == 24
    assert torch.allclose(second[0], x.T @ x / 24, atol=1e-5)
    assert torch.allclose(cross[0], x0.T @ x / 24, atol=1e-5)
    second, cross = moments.matrices(centred=True)
    assert torch.allclose(second[0], torch.cov(x.T, correction=0), atol=1e-5)
    assert torch.allclose(cross[0], (x0 - x0.mean(0)).T @ (x - x.mean(0)) / 24, atol=1e-5)


def test_uses_of_one_weight_are_summed_up() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(8, 6)]
    inner = nn.Linear(6, 6)
    graph, original, task = twins(nn.Sequential(inner, nn.Tanh(), inner), batches)
    (moments,) = gather(graph, original, list(zip(layers(graph), layers(original), strict=True)), task, 8).values()
    with torch.no_grad():
        both = torch.cat([batches[0], torch.tanh(inner(batches[0]))])
    assert moments.count == 16
    assert torch.allclose(moments.second[0], both.T @ both, atol=1e-4)
