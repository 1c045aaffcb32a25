"""Linear layers and tables of embeddings as matrices in the tensor-train format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..errors import StepError
from ..graph import Graph, Layer
from ..graph.matrix import positions
from ..graph.model import aten
from ..step import option
from .chain import Link, Writer
from .method import Back, Factorization, missed, several
from .ranks import Curve

_RANKS = 12  # that are tried of each layer, evenly by the logarithm


@dataclass(frozen=True)
class TensorTrain(Factorization):
    """Replaces a matrix by a train of small cores (Novikov et al. 2015, "Tensorizing neural networks", sections 3 and 4).

    Outputs and inputs are written as products of `cores` numbers, as equal as can be; core k is [rank, outputs k, inputs k, rank], and
    the ranks between are the same wherever they can be. Cores come from singular values, one after the other (Oseledets 2011, algorithm
    1). A linear layer becomes reshapes and one small linear layer for each core; a table of embeddings is padded to a product and looked
    up core by core, and never laid out. The approximation is that of the weight; data only tell what it does to the outputs.
    """

    kinds: ClassVar[Sequence[str]] = ("linear", "embedding")
    composes: ClassVar[bool] = False

    cores: int = option(3, "in a train, 2 or more")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cores < 2:
            raise StepError(f"factorize.TensorTrain: cores is {self.cores}.", "2 or more")
        if self.weighting != "inputs":
            raise StepError(f"factorize.TensorTrain: weighting is {self.weighting!r}.", "inputs: a train is nearest to its weight alone")

    def curve(self, layer: Layer, weight: Tensor, second: Tensor | None, macs: bool) -> Curve:
        shapes = self._shapes(layer, weight)
        full = _full(shapes)
        given = None if isinstance(self.rank, str | None) else several(self.rank)
        tried = sorted({round(max(full) ** (step / _RANKS)) for step in range(_RANKS + 1)})
        choices = [[min(rank, most) for most in full] for rank in tried]
        if given is not None and len(given) in (1, len(full)):
            choices = [[min(rank, most) for rank, most in zip(given * len(full) if len(given) == 1 else given, full, strict=True)]]
        elif self.rank == "vbmf":
            choices = [self.apparent(layer, weight)]
        whole, costs = weight.numel() * (positions(layer) if macs else 1), [_cost(shapes, ranks) for ranks in choices]
        if macs:
            costs = [_macs(shapes, ranks) * positions(layer) for ranks in choices]
        kept = [place for place, cost in enumerate(costs) if cost < whole or len(choices) == 1] or [0]
        lost = [missed(weight, self.dense(layer, weight, None, choices[place]), second) for place in kept]
        spent, ranks = torch.tensor([costs[place] for place in kept], dtype=torch.double), torch.tensor([choices[place] for place in kept])
        return Curve(torch.tensor(lost, dtype=torch.double), spent, ranks, whole, tuple(full))

    def unfoldings(self, layer: Layer, weight: Tensor) -> list[Tensor]:
        shapes, table = self._shapes(layer, weight), layer.kind == "embedding"
        folded = _folded(weight.T if table else weight, shapes)
        return [folded.flatten(0, place).flatten(1) for place in range(len(shapes) - 1)]

    def links(self, layer: Layer, weight: Tensor, second: Tensor | None, ranks: Sequence[int]) -> list[Link]:
        shapes = self._shapes(layer, weight)
        table, links = layer.kind == "embedding", list[Link]()
        cores = train(_folded(weight.T if table else weight, shapes), shapes, ranks)
        rest = math.prod(inputs for _, inputs in shapes)
        for core, (outputs, inputs) in zip(cores, shapes, strict=True):
            rest //= inputs
            before, after = core.shape[0], core.shape[3]
            swap = (aten.permute.default, [0, 2, 1])
            views = [*([swap] if links else []), (aten.reshape.default, [-1, before * inputs, rest]), swap]
            links.append(
                Link(aten.linear.default, core.permute(1, 3, 0, 2).reshape(outputs * after, before * inputs), views=tuple(views))
                if layer.kind == "linear"
                else Link(aten.embedding.default, core.transpose(0, 1).reshape(outputs, -1))
            )
        return links

    def dense(self, layer: Layer, weight: Tensor, second: Tensor | None, ranks: Sequence[int], back: Back = list) -> Tensor:
        shapes, table = self._shapes(layer, weight), layer.kind == "embedding"
        found = joined(train(_folded(weight.T if table else weight, shapes), shapes, ranks))
        return found[: weight.shape[1]].T if table else found

    def put(self, graph: Graph, layer: Layer, links: list[Link]) -> None:
        if layer.kind == "linear":
            super().put(graph, layer, links)
            return
        shapes = self._shapes(layer, graph.tensor(layer.weight).T)
        _look_up(graph, layer, [link.weight for link in links], shapes)

    def _shapes(self, layer: Layer, weight: Tensor) -> list[tuple[int, int]]:
        table = layer.kind == "embedding"
        return factored(weight.shape[table], weight.shape[1 - table], self.cores, table)


def factored(outputs: int, inputs: int, cores: int, padded: bool) -> list[tuple[int, int]]:
    """The sizes of each core: falling factors of the outputs, or of a little more, with rising ones of the inputs."""
    first = _padded(outputs, cores) if padded else _even(outputs, cores)
    return list(zip(first[::-1], _even(inputs, cores), strict=True))


@cache
def _even(number: int, parts: int) -> tuple[int, ...]:
    """The factors of a number that are most alike, rising: those of the least sum."""
    if parts == 1:
        return (number,)
    found = [(divisor, *_even(number // divisor, parts - 1)) for divisor in range(1, number + 1) if number % divisor == 0]
    return min((tuple(sorted(each)) for each in found), key=lambda each: (sum(each), each))


def _padded(number: int, parts: int) -> tuple[int, ...]:
    """Like factors, rising, of the least product that is not below a number."""
    found = list[int]()
    for part in range(parts, 0, -1):
        found.append(math.ceil(round((number / math.prod(found)) ** (1 / part), 9)))
    return tuple(sorted(found))


def _folded(matrix: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """A matrix [rows, columns], with zeros for rows that are missing, as [rows 1 * columns 1, rows 2 * columns 2, ...]."""
    rows, columns = zip(*shapes, strict=True)
    padded = torch.cat([matrix, matrix.new_zeros(math.prod(rows) - len(matrix), matrix.shape[1])])
    order = [dim for pair in zip(range(len(shapes)), range(len(shapes), 2 * len(shapes)), strict=True) for dim in pair]
    return padded.reshape(*rows, *columns).permute(order).reshape([a * b for a, b in shapes])


def train(tensor: Tensor, shapes: Sequence[tuple[int, int]], ranks: Sequence[int]) -> list[Tensor]:
    """Cores [rank before, rows, columns, rank after] of a folded matrix, by singular values."""
    cores, rest, before = list[Tensor](), tensor.reshape(1, -1), 1
    for (rows, columns), rank in zip(shapes, ranks, strict=False):
        matrix = rest.reshape(before * rows * columns, -1)
        left, rest = _halves(matrix, min(rank, *matrix.shape))
        cores.append(left.reshape(before, rows, columns, -1))
        before = left.shape[1]
    return [*cores, rest.reshape(before, *shapes[-1], 1)]


def _halves(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a matrix of this rank, as two factors, the left with orthonormal columns."""
    if matrix.shape[0] <= matrix.shape[1]:
        left = torch.linalg.eigh(matrix @ matrix.T)[1].flip(1)[:, :rank]
        return left, left.T @ matrix
    right = torch.linalg.eigh(matrix.T @ matrix)[1].flip(1)[:, :rank]
    left, rest = torch.linalg.qr(matrix @ right)
    return left, rest @ right.T


def joined(cores: Sequence[Tensor]) -> Tensor:
    """The matrix [rows, columns] of a train."""
    found = cores[0].squeeze(0)
    for core in cores[1:]:
        found = torch.einsum("abr,rcds->acbds", found, core).flatten(2, 3).flatten(0, 1)
    return found.squeeze(-1)


def _full(shapes: Sequence[tuple[int, int]]) -> list[int]:
    sizes = [a * b for a, b in shapes]
    return [min(math.prod(sizes[:place]), math.prod(sizes[place:])) for place in range(1, len(sizes))]


def _cost(shapes: Sequence[tuple[int, int]], ranks: Sequence[int]) -> int:
    """The parameters of the cores."""
    return sum(a * rows * columns * b for (rows, columns), a, b in zip(shapes, [1, *ranks], [*ranks, 1], strict=True))


def _macs(shapes: Sequence[tuple[int, int]], ranks: Sequence[int]) -> int:
    """The multiply-accumulates of a vector through the chain."""
    total, done, rest = 0, 1, math.prod(columns for _, columns in shapes)
    for (rows, columns), a, b in zip(shapes, [1, *ranks], [*ranks, 1], strict=True):
        rest //= columns
        total += done * rest * (a * columns) * (rows * b)
        done *= rows
    return total


def _look_up(graph: Graph, layer: Layer, tables: Sequence[Tensor], shapes: Sequence[tuple[int, int]]) -> None:
    """An embedding reads core by core, [rows of the core, rank before * columns * rank after], by the digits of its numbers."""
    write, given = Writer(graph, layer), layer.node.args[1]
    assert isinstance(given, fx.Node)
    below, found, rank = math.prod(rows for rows, _ in shapes), None, 1
    for place, (table, (rows, columns)) in enumerate(zip(tables, shapes, strict=True)):
        below //= rows
        digit: Any = write.call(aten.div.Tensor_mode, given, below) if below > 1 else given
        if below > 1:
            digit.kwargs = {"rounding_mode": "floor"}
        digit = write.call(aten.remainder.Scalar, digit, rows) if place else digit
        core = write.call(aten.embedding.default, write.factor(place, table), digit)
        after = table.shape[1] // rank // columns
        if found is None:
            found = write.call(aten.reshape.default, core, [-1, columns, after])
        else:
            product = write.call(aten.matmul.default, found, write.call(aten.reshape.default, core, [-1, rank, columns * after]))
            found = write.call(aten.reshape.default, product, [-1, math.prod(c for _, c in shapes[: place + 1]), after])
        rank = after
    assert found is not None
    shape = layer.node.meta["val"].shape
    write.finish(write.shaped(found, given, len(shape) - 1, shape[-1]))
