"""Residual blocks are found in the operators, and taken out."""

import torch
from torch import Tensor, nn

from multum import capture
from multum.graph import Graph
from multum.graph.residual import blocks, skip


class Stream(nn.Module):
    """Two branches with a norm after the first, one inside another, a shortcut with weights, and a sum that is no block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.outer, self.inner = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.back, self.shortcut, self.wide, self.head = nn.Linear(6, 6), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.first(x))
        h = self.outer(x)
        h = h + 0.1 * h**3
        h = self.inner(h) + h
        x += self.back(h)
        return self.head(torch.relu(self.shortcut(x) + self.wide(x)))


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


def made() -> tuple[Stream, Graph]:
    model = Stream().eval()
    return model, capture(model, X)


def test_blocks_and_what_only_they_need() -> None:
    _, graph = made()
    assert [(block.name, block.layers) for block in blocks(graph)] == [
        ("first", ("first",)),
        ("inner", ("inner",)),
        ("back", ("outer", "inner", "back")),
    ]
    assert [block.norm is not None for block in blocks(graph)] == [True, False, False]


def test_what_is_left_computes_as_if_the_branch_were_not_there() -> None:
    model, graph = made()
    first, inner, back = blocks(graph)
    skip(graph, [(first, first.norm), (back, back.total), (inner, inner.total)])
    assert sorted({name.split(".")[0] for name, _ in graph.named_tensors()}) == ["head", "shortcut", "wide"]
    expected = model.head(torch.relu(model.shortcut(X) + model.wide(X)))
    torch.testing.assert_close(graph(X), expected)


def test_the_norm_stays_when_the_sum_alone_is_skipped() -> None:
    model, graph = made()
    first, _, back = blocks(graph)
    skip(graph, [(first, first.total), (back, back.total)])
    x = model.norm(X)
    torch.testing.assert_close(graph(X), model.head(torch.relu(model.shortcut(x) + model.wide(x))))


def test_a_branch_that_is_read_elsewhere_is_no_block() -> None:
    class Shown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.layer(x)
            return x + y, y

    assert blocks(capture(Shown(), X)) == []
