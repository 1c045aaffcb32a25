"""Weights that have not chosen their entry of a codebook yet, and choose it while they train."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, fx

from ..graph import Graph
from ..graph.model import aten
from ..train import Companion
from .codebook import Add, replace_reads

_LAST = 1e-3  # of the temperature: nearly every weight is one entry then
_SETTLED = 0.8  # share of the training after which it stays there


class Soft(Companion):
    """Every weight that reads softly is the mean of all entries of its codebook, entry k with the share softmax(-cost_k / temperature)
    (Cho et al. 2022, "DKM: differentiable k-means clustering layer", section 3.2; there costs are distances and the temperature stays).

    The cost of an entry is the weighted squared error plus a penalty, as in `kmeans.assign`. Temperatures begin at what vectors cost on
    average and fall geometrically, so that the choices harden; only then may a state be the result. Gradients reach the weights, which may
    change their minds, and the entries.
    """

    def __init__(self) -> None:
        self.key = f"soft to {_LAST}"
        self.first: dict[str, float] = {}  # the temperature to begin with, by the name of its buffer

    def read(
        self, graph: Graph, weight: str, counted: Tensor, book: str, penalty: Tensor, lost: float, across: bool, scale: Tensor | None,
        zero: bool,
    ) -> None:  # fmt: skip
        """The tensor `weight` reads its codebook softly wherever the graph reads it, in place.

        `counted` [groups, n, size] are the weights of errors, `book` names a parameter [groups * entries, size], `penalty`
        [groups, entries] is in the unit of the costs, `lost` is the mean cost of a vector; groups are columns when `across`; with `zero`
        what is zero stays so.
        """
        groups, entries = penalty.shape
        size = counted.shape[2]
        rows = graph.tensor(weight).shape[0]
        name = f"{weight}_temperature"
        self.first[name] = max(lost, 1e-12)
        values = {"counts": counted, "penalty": penalty[:, None], "temperature": counted.new_tensor(self.first[name])}
        for part, value in values.items():  # in the type of the weight, and copies, which a checkpoint wants
            graph.set_tensor(f"{weight}_{part}", value.to(graph.tensor(weight).dtype, copy=True))
        if scale is not None:
            graph.set_tensor(f"{weight}_scale", scale, parameter=True)

        def softly(tensor: Callable[[str], fx.Node], add: Add, row: fx.Node | None) -> fx.Node:
            value = tensor(weight) if scale is None else add(aten.div.Tensor, tensor(weight), tensor(f"{weight}_scale"))
            vectors = add(aten.reshape.default, value, [rows if across else groups, -1, size])
            vectors = add(aten.transpose.int, vectors, 0, 1) if across else vectors
            codebook = add(aten.reshape.default, tensor(book), [groups, entries, size])
            counts = tensor(f"{weight}_counts")
            products = add(aten.matmul.default, add(aten.mul.Tensor, counts, vectors), add(aten.transpose.int, codebook, 1, 2))
            squares = add(aten.matmul.default, counts, add(aten.transpose.int, add(aten.mul.Tensor, codebook, codebook), 1, 2))
            cost = add(aten.add.Tensor, add(aten.sub.Tensor, squares, add(aten.mul.Tensor, products, 2)), tensor(f"{weight}_penalty"))
            shares = add(aten.softmax.int, add(aten.div.Tensor, add(aten.neg.default, cost), tensor(name)), -1)
            found = add(aten.matmul.default, shares, codebook)
            if zero:
                found = add(aten.mul.Tensor, found, add(aten.ne.Scalar, vectors, 0))
            if across:
                found = add(aten.transpose.int, found, 0, 1)
            if row is None:
                return found
            return add(aten.embedding.default, add(aten.reshape.default, found, [rows, -1]), row)

        replace_reads(graph, weight, softly, f"{weight}_scale" if scale is not None else None)

    def join(self, graph: Graph) -> None:
        self.graph = graph

    def after(self, step: int, steps: int) -> None:
        fallen = _LAST ** min(1.0, (step + 1) / (_SETTLED * steps))
        for name, first in self.first.items():
            self.graph.tensor(name).fill_(first * fallen)

    def met(self) -> bool:
        return all(float(self.graph.tensor(name)) < 1.01 * _LAST * first for name, first in self.first.items())
