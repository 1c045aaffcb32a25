"""A layer is its matrix times its columns, for every kind of window."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from multum import capture
from multum.graph import matrix
from multum.graph.layers import layers
from multum.graph.watch import Watch


class Transposed(nn.Module):
    """x @ W with the outputs in the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(7))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, 5), self.weight)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 7), (3, 4, 5)),
    "transposed": (Transposed, (3, 4, 5)),
    "1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1), (3, 4, 9)),
    "same": (lambda: nn.Conv1d(4, 6, 3, padding="same", bias=False), (3, 4, 9)),
    "2d": (lambda: nn.Conv2d(3, 8, (3, 1), (2, 1), (1, 0), (1, 1)), (2, 3, 7, 6)),
    "dilated": (lambda: nn.Conv2d(3, 8, 3, 1, 2, 2), (2, 3, 7, 6)),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, groups=2), (2, 6, 7, 6)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), (2, 6, 7, 6)),
    "3d": (lambda: nn.Conv3d(2, 4, 2), (2, 2, 4, 4, 4)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk", [1 << 26, 1])
def test_matrix_times_columns_is_the_layer(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "_CHUNK", chunk)
    make, size = CASES[name]
    graph = capture(make().double(), torch.randn(size, dtype=torch.double)).requires_grad_(False)
    (layer,) = layers(graph)
    assert matrix.multiplies(layer)
    weight, seen = graph.tensor(layer.weight), dict[str, Tensor]()
    Watch(graph, [matrix.data(layer), layer.node], lambda node, value: seen.__setitem__(node.name, value))(torch.randn(size).double())
    found = matrix.to_matrix(layer, weight)
    assert torch.equal(matrix.from_matrix(layer, found, weight.shape), weight)
    bias = torch.zeros(1) if layer.bias is None else graph.tensor(layer.bias).reshape(found.shape[0], -1, 1)
    count = 0
    for x, y in matrix.pairs(layer, seen[matrix.data(layer).name], seen[layer.node.name], weight.shape):
        torch.testing.assert_close(found @ x + bias, y)
        count += y.numel()
    assert count == seen[layer.node.name].numel()


@pytest.mark.parametrize("make", [lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), lambda: nn.Embedding(5, 4)])
def test_other_layers_have_a_matrix_by_outputs_and_no_columns(make: Callable[[], nn.Module]) -> None:
    model = make()
    graph = capture(model, torch.zeros(2, 4, 5, 5) if isinstance(model, nn.ConvTranspose2d) else torch.zeros(2, 3, dtype=torch.long))
    (layer,) = layers(graph)
    weight = graph.tensor(layer.weight)
    assert not matrix.multiplies(layer)
    assert matrix.to_matrix(layer, weight).shape[1] == weight.shape[layer.axis]
    assert torch.equal(matrix.from_matrix(layer, matrix.to_matrix(layer, weight), weight.shape), weight)
