"""A convolution as rank-one parts: points, single windows, points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..errors import StepError
from ..graph import Graph, Layer
from ..graph.matrix import data, positions, refitted
from ..graph.model import aten, shape
from ..step import option
from .chain import Link, composed
from .method import Factorization, missed, per_dimension, several
from .ranks import Curve
from .spatial import along
from .tucker import rooted

_RANKS = 6  # that are tried of each layer, evenly by the logarithm
_SETTLED = 1e-5  # of the energy: a round that brings less is the last
_NOISE = 0.01  # of where the factors begin
_PRICES, _CHEAPER = (1e-3, 1e-8), 0.1  # of large factors, at first and at last, and how it falls


@dataclass(frozen=True)
class CP(Factorization):
    """Replaces a convolution by a 1x1 one, one with a single window for each channel, and a 1x1 one: a sum of rank-one tensors.

    A CP decomposition (Lebedev et al. 2015, "Speeding-up convolutional neural networks using fine-tuned CP-decomposition", section 3) by
    alternating least squares; with `parts` 4 the windows of two dimensions are k x 1 and 1 x k ones, as there. Terms that grow while they
    cancel each other make it unstable, so their norms have a price, which falls while the squares of all come to at most `bound` times that
    of the weight (in the spirit of Phan et al. 2020, "Stable low-rank tensor decomposition for compression of convolutional neural
    network", section 3). A layer for which it does not settle in `rounds` stays as it is. With calibration data inputs count by
    their power, and the last convolution is fitted to the layer's outputs by least squares.
    """

    parts: int = option(3, "convolutions in the chain: 3, or 4 with windows of k x 1 and 1 x k")
    rounds: int = option(400, "of alternating least squares, at most")
    bound: float = option(10.0, "sum of the squared norms of the terms, at most, in those of the weight")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parts not in (3, 4):
            raise StepError(f"factorize.CP: parts is {self.parts}.", "3 or 4")
        if self.rounds < 1 or self.bound < 1:
            raise StepError(f"factorize.CP: rounds is {self.rounds}, bound {self.bound}.", "at least 1 each")

    def reason(self, graph: Graph, layer: Layer) -> str | None:
        window = graph.tensor(layer.weight).shape[2:]
        if window.numel() == 1:
            return "its window is a point: factorize.SVD is for that"
        return (
            None if self.parts == 3 or (len(window) == 2 and min(window) > 1) else "its window is not two-dimensional: parts=3 is for that"
        )

    def curve(self, layer: Layer, weight: Tensor, second: Tensor | None, macs: bool) -> Curve:
        before, after = (prod(shape(data(layer))[2:]), positions(layer)) if macs else (1, 1)
        outputs, inputs, *window = weight.shape
        middle = prod(window) * after
        if self.parts == 4:
            middle = window[0] * (shape(layer.node)[2] * shape(data(layer))[3] if macs else 1) + window[1] * after
        each, whole = inputs * before + middle + outputs * after, weight.numel() * after
        sizes = list(_folded(weight, self.parts).shape)
        full = min(weight.numel() // size for size in sizes)
        most = max(1, min(full, math.ceil(whole / each) - 1))
        tried = sorted({round(most ** (step / _RANKS)) for step in range(1, _RANKS + 1)})
        if not isinstance(self.rank, str | None):
            tried = [min(several(self.rank)[0], full)]
        elif self.rank == "vbmf":
            tried = self.apparent(layer, weight)
        lost, ranks, failed = list[float](), list[int](), list[int]()
        for rank in tried:
            found, settled = self._decomposed(weight, second, rank)
            if settled:
                ranks.append(rank)
                lost.append(missed(weight, composed(self._chain(layer, weight, second, found), weight.shape), second))
            else:
                failed.append(rank)
        note = f"CP did not settle in {self.rounds} rounds within its bound at rank {', '.join(map(str, failed))}" if failed else ""
        costs = torch.tensor(ranks, dtype=torch.double) * each
        return Curve(torch.tensor(lost, dtype=torch.double), costs, torch.tensor(ranks)[:, None], whole, (full,), note)

    def unfoldings(self, layer: Layer, weight: Tensor) -> list[Tensor]:
        return [weight.flatten(1), weight.transpose(0, 1).flatten(1)]

    def apparent(self, layer: Layer, weight: Tensor) -> list[int]:
        return [max(super().apparent(layer, weight))]

    def links(self, layer: Layer, weight: Tensor, second: Tensor | None, ranks: Sequence[int]) -> list[Link]:
        return self._chain(layer, weight, second, self._decomposed(weight, second, ranks[0])[0])

    def _decomposed(self, weight: Tensor, second: Tensor | None, rank: int) -> tuple[list[Tensor], bool]:
        """Factors of inputs and windows [size, rank], and whether they settled within the bound."""
        root = rooted(weight, second)
        folded = torch.einsum("oi...,ij->oj...", _folded(weight, self.parts), root)
        (_, inner, *windows), settled = alternating(folded, rank, self.rounds, self.bound)
        return [torch.linalg.solve_triangular(root.T, inner, upper=True), *windows], settled

    def _chain(self, layer: Layer, weight: Tensor, second: Tensor | None, factors: Sequence[Tensor]) -> list[Link]:
        (outputs, inputs, *window), rank = weight.shape, factors[0].shape[1]
        inner, *windows = (factor / factor.norm(dim=0).clamp_min(1e-30) for factor in factors)
        features = inner
        for factor in windows:
            features = (features[:, None] * factor).flatten(0, 1)
        outer = refitted(weight.flatten(1), second, features.T)
        root = outer.norm(dim=0).sqrt().clamp_min(1e-30)
        ones = [1] * len(window)
        point = getattr(aten, f"conv{len(window)}d").default
        parts = [per_dimension(layer, name) for name in ("stride", "padding", "dilation")]
        links = [Link(point, (inner * root).T.reshape(rank, inputs, *ones))]
        if self.parts == 3:
            links.append(Link(layer.node.target, windows[0].T.reshape(rank, 1, *window), (*parts, rank)))
        else:
            for dim, factor in enumerate(windows):
                form = [rank, 1, *(n if other == dim else 1 for other, n in enumerate(window))]
                ways = (along(part, dim, other) for part, other in zip(parts, (1, 0, 1), strict=True))
                links.append(Link(layer.node.target, factor.T.reshape(form), (*ways, rank)))
        return [*links, Link(point, (outer / root).reshape(outputs, rank, *ones))]


def alternating(tensor: Tensor, rank: int, rounds: int, bound: float) -> tuple[list[Tensor], bool]:
    """Factors [size, rank] of each dimension of a tensor, and whether they settled.

    Least squares for one factor after the other, with a price of their squared norms; the columns of all have equal norms. Each time a
    round brings next to nothing the price falls, until the squared norms of the rank-one terms come to more than `bound` times the
    tensor's: what settled last within it counts.
    """
    random, dims = torch.Generator().manual_seed(0), range(tensor.ndim)
    size = tensor.norm().clamp_min(1e-150)
    unfolded = [tensor.movedim(dim, 0).flatten(1) / size for dim in dims]
    factors = [_leading(matrix, rank, random) for matrix in unfolded]
    price, before, kept = _PRICES[0], math.inf, list[Tensor]()
    for _ in range(rounds):
        for dim in dims:
            features, *others = [factors[other] for other in dims if other != dim]
            for factor in others:
                features = (features[:, None] * factor).flatten(0, 1)
            gram, pull = features.T @ features, unfolded[dim] @ features
            factors[dim] = torch.linalg.solve(gram + price * torch.eye(rank).to(gram), pull.T).T
        missing = 1 - 2 * float((pull * factors[-1]).sum()) + float((factors[-1].T @ factors[-1] * gram).sum())
        norms = torch.stack([factor.norm(dim=0) for factor in factors])
        terms = norms.prod(0)
        if not float(terms.square().sum()) <= bound:  # or it is no number
            break
        factors = [f / n.clamp_min(1e-150) * terms.pow(1 / len(dims)) for f, n in zip(factors, norms, strict=True)]
        if before - missing > _SETTLED:
            before = missing
            continue
        kept, price, before = factors, price * _CHEAPER, math.inf
        if price < _PRICES[1]:
            break
    return kept or factors, bool(kept)


def _folded(weight: Tensor, parts: int) -> Tensor:
    """[outputs, inputs, window], of a chain of four parts with the two dimensions of the window."""
    return weight.flatten(2) if parts == 3 else weight


def _leading(matrix: Tensor, rank: int, random: torch.Generator) -> Tensor:
    """The leading directions of a matrix's columns and random ones, with a little noise: symmetric tensors have saddles [size, rank]."""
    found = torch.linalg.eigh(matrix @ matrix.T)[1].flip(1)[:, :rank]
    noise = torch.randn(len(matrix), rank, generator=random, dtype=matrix.dtype).to(matrix.device) / len(matrix) ** 0.5
    return torch.cat([found + _NOISE * noise[:, : found.shape[1]], noise[:, found.shape[1] :]], 1)
