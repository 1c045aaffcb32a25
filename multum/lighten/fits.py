"""Cheap blocks that come nearest to a dense layer: least squares on the second moments of what it reads.

A layer is its matrix [outputs, height], the height being input channels times places of the window, and `second` are the second moments of
its columns [height, height]; both in double precision. Each form gives the parts of the block and the matrix that they make together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..graph.matrix import refitted, solved

_DAMP = 1e-6  # of the mean of a diagonal, added to it
_ROUNDS = 3  # of alternating least squares
_MOST = 4096  # unknowns that are solved for at once


@dataclass(frozen=True, eq=False)
class Part:
    """A convolution of a block: its weight [outputs, inputs of a group, window], and what stands around it.

    Where `window` is set it has the stride of the layer, and its padding and dilation but for `dilation` times as wide a step between taps.
    Afterwards channels are dealt out: `shuffle` groups of them in turn. With an `order` the part's input is put before its outputs
    and the channels are read in this order.
    """

    weight: Tensor
    groups: int = 1
    window: bool = False
    dilation: int = 1
    shuffle: int = 1
    order: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Dense:
    """The layer that is to be replaced, and how wide its block shall be."""

    matrix: Tensor
    second: Tensor
    inputs: int
    window: tuple[int, ...]  # empty for a linear layer
    groups: int = 4
    expansion: int = 1
    ratio: float = 0.5
    kernel: int = 3

    @property
    def taps(self) -> int:
        return self.matrix.shape[1] // self.inputs

    def point(self, weight: Tensor) -> Tensor:
        """A matrix [outputs, inputs] as the weight of a convolution whose window is a point."""
        return weight.reshape(*weight.shape, *[1] * max(1, len(self.window)))

    def windowed(self, weight: Tensor) -> Tensor:
        """A matrix [outputs, inputs x taps] as the weight of a convolution with the layer's window."""
        return weight.reshape(len(weight), -1, *(self.window or (1,)))


Fit = Callable[[Dense], tuple[list[Part], Tensor]]


def lost(dense: Dense, matrix: Tensor) -> float:
    """The share of the energy of the layer's outputs by which another matrix misses them."""
    off = dense.matrix - matrix
    total = float(((dense.matrix @ dense.second) * dense.matrix).sum())
    return max(0.0, float(((off @ dense.second) * off).sum())) / max(total, 1e-30)


def separable(dense: Dense) -> tuple[list[Part], Tensor]:
    """`expansion` filters for each input channel, then a 1x1 convolution (Howard et al. 2017, section 3.1): a low rank per channel.

    Both are fitted in turn, each the exact optimum given the other.
    """
    filters, last = _depthwise(dense)
    made = last @ _spread(dense, filters)
    filters, last = _balanced(filters, last)
    depth = filters.reshape(-1, 1, *dense.window)
    return [Part(depth, groups=dense.inputs, window=True), Part(dense.point(last))], made


def inverted(dense: Dense) -> tuple[list[Part], Tensor]:
    """The same between two 1x1 convolutions (Sandler et al. 2018, section 3.3), the first of which copies channels at first."""
    filters, last = _depthwise(dense)
    made = last @ _spread(dense, filters)
    filters, last = _balanced(filters, last)
    copies = torch.eye(dense.inputs, dtype=last.dtype, device=last.device).repeat_interleave(dense.expansion, 0)
    depth = filters.reshape(-1, 1, *dense.window)
    return [Part(dense.point(copies)), Part(depth, groups=len(copies), window=True), Part(dense.point(last))], made


def grouped(dense: Dense) -> tuple[list[Part], Tensor]:
    """Each group of outputs reads its group of inputs alone: of a linear layer, a block-diagonal matrix."""
    made = torch.zeros_like(dense.matrix)
    rows, blocks = _grouping(dense)
    for own, block in zip(rows, blocks, strict=True):
        made[own[:, None], block] = solved(dense.second[block][:, block], (dense.matrix[own] @ dense.second[:, block]).T).T
    weight = torch.cat([made[own][:, block] for own, block in zip(rows, blocks, strict=True)])
    return [Part(dense.windowed(weight), groups=dense.groups, window=True)], made


def shuffled(dense: Dense) -> tuple[list[Part], Tensor]:
    """Two grouped layers with a shuffle between (Zhang et al. 2018, section 3.1); of a linear layer a Monarch matrix.

    Each block between a group of inputs and one of outputs is of low rank, so its singular vectors are the optimum (Dao et al. 2022,
    section 3.3), here of what it makes of its own inputs; the second layer is then refitted to all.
    """
    rows, blocks = _grouping(dense)
    count, rank = dense.groups, max(1, len(dense.matrix) // dense.groups**2)
    rank = min(rank, len(rows[0]), len(blocks[0]))
    features = dense.matrix.new_zeros(count, count, rank, dense.matrix.shape[1])  # by groups of inputs and of outputs
    for place, block in enumerate(blocks):
        root = _root(dense.second[block][:, block])
        for slot, own in enumerate(rows):
            found = torch.linalg.svd(dense.matrix[own][:, block] @ root, full_matrices=False).Vh[:rank]
            features[place, slot][:, block] = torch.linalg.solve(root, found, left=False)
    first = torch.cat([features[place].flatten(0, 1)[:, block] for place, block in enumerate(blocks)])
    made, second = torch.zeros_like(dense.matrix), []
    for slot, own in enumerate(rows):
        read = features[:, slot].flatten(0, 1)
        second.append(refitted(dense.matrix[own], dense.second, read))
        made[own] = second[-1] @ read
    size = features.square().mean().sqrt().clamp_min(1e-30)
    parts = [Part(dense.windowed(first / size), groups=count, window=True, shuffle=count)]
    return [*parts, Part(dense.point(torch.cat(second) * size), groups=count)], made


def ghost(dense: Dense) -> tuple[list[Part], Tensor]:
    """Half of the outputs, an even number; each of the others is made of one of them by a cheap window (Han et al. 2020, section 3.1).

    Which is made of which: those that are kept are chosen one by one so that all are nearest to one of them, then paired; a window
    begins with its middle alone, the coefficient of regression.
    """
    outputs = len(dense.matrix)
    covariance = dense.matrix @ dense.second @ dense.matrix.T
    energy = covariance.diagonal().clamp_min(1e-30)
    told = covariance.square() / energy[:, None]  # of the energy of the second, by the first
    best, kept = torch.zeros_like(energy), list[int]()
    for _ in range(outputs // 2):
        gain = (told - best).clamp_min(0).sum(1)
        gain[kept] = -1.0
        kept.append(int(gain.argmax()))
        best = torch.maximum(best, told[kept[-1]])
    rest = [row for row in range(outputs) if row not in set(kept)]
    pairs = _paired(told[kept][:, rest])
    twins = [rest[other] for other in pairs]
    slopes = covariance[twins, kept] / energy[kept]
    window = [1 if size == 1 else 3 for size in dense.window]
    cheap = dense.matrix.new_zeros(len(kept), 1, *window)
    cheap.view(len(kept), -1)[:, cheap[0].numel() // 2] = slopes
    made = dense.matrix.clone()
    made[twins] = slopes[:, None] * dense.matrix[kept]
    order = torch.tensor([*kept, *twins], device=made.device).argsort()
    return [Part(dense.windowed(dense.matrix[kept]), window=True), Part(cheap, groups=len(kept), order=order)], made


def bottleneck(dense: Dense) -> tuple[list[Part], Tensor]:
    """The window on `ratio` of the channels, between two 1x1 convolutions (He et al. 2016, section 4.1).

    Leading directions of the inputs, by what the window makes of them, then of the outputs; the last layer is refitted.
    """
    shape = (len(dense.matrix), dense.inputs, dense.taps)
    outputs, inputs = (max(1, round(dense.ratio * size)) for size in shape[:2])
    covariance = dense.second.reshape(*shape[1:], *shape[1:]).diagonal(dim1=1, dim2=3).mean(2)
    root, kernel = _root(covariance), dense.matrix.reshape(shape)
    pull = torch.einsum("oit,ojt->ij", kernel, kernel)
    inner = torch.linalg.eigh(root.T @ pull @ root).eigenvectors[:, -inputs:]
    first = torch.linalg.solve(root, inner.T, left=False)
    core = torch.einsum("oit,ir->ort", kernel, root @ inner)
    middle = _leading(dense, outputs).T @ core.flatten(1)
    features = torch.einsum("srt,ri->sit", middle.reshape(outputs, inputs, -1), first).flatten(1)
    last = refitted(dense.matrix, dense.second, features)
    return [Part(dense.point(first)), Part(dense.windowed(middle), window=True), Part(dense.point(last))], last @ features


def low_rank(dense: Dense) -> tuple[list[Part], Tensor]:
    """Two layers with `ratio` of the channels between them: leading directions of the outputs."""
    outer = _leading(dense, max(1, round(dense.ratio * min(dense.matrix.shape))))
    inner = outer.T @ dense.matrix
    size = (inner.norm() / outer.norm()).sqrt().clamp_min(1e-30)
    return [Part(dense.windowed(inner / size), window=True), Part(dense.point(outer * size))], outer @ inner


def smaller(dense: Dense) -> tuple[list[Part], Tensor]:
    """The middle `kernel` x `kernel` of the window, which makes good what the rim did."""
    return _subset(dense, 1)


def dilated(dense: Dense) -> tuple[list[Part], Tensor]:
    """`kernel` x `kernel` taps spread evenly over the whole window (Yu & Koltun 2016)."""
    return _subset(dense, (dense.window[0] - 1) // (dense.kernel - 1))


FITS: dict[str, Fit] = {
    "separable": separable,
    "inverted": inverted,
    "grouped": grouped,
    "shuffled": shuffled,
    "ghost": ghost,
    "bottleneck": bottleneck,
    "low_rank": low_rank,
    "smaller": smaller,
    "dilated": dilated,
}


def _subset(dense: Dense, step: int) -> tuple[list[Part], Tensor]:
    half = step * (dense.kernel - 1) // 2
    axes = [torch.arange(size // 2 - half, size // 2 + half + 1, step) if size > 1 else torch.zeros(1).long() for size in dense.window]
    places = torch.arange(dense.taps).reshape(dense.window)[torch.meshgrid(*axes, indexing="ij")].flatten()
    columns = (torch.arange(dense.inputs)[:, None] * dense.taps + places).flatten().to(dense.matrix.device)
    weight = solved(dense.second[columns][:, columns], (dense.matrix @ dense.second[:, columns]).T).T
    made = torch.zeros_like(dense.matrix)
    made[:, columns] = weight
    form = [len(axis) for axis in axes]
    return [Part(weight.reshape(len(weight), dense.inputs, *form), window=True, dilation=step)], made


def _depthwise(dense: Dense) -> tuple[Tensor, Tensor]:
    """Filters [inputs x expansion, taps] and the 1x1 layer [outputs, inputs x expansion] behind them."""
    taps, many = dense.taps, dense.expansion
    filters = dense.matrix.new_zeros(dense.inputs, many, taps)
    for place in range(dense.inputs):
        own = slice(place * taps, (place + 1) * taps)
        root = _root(dense.second[own, own])
        leading = torch.linalg.svd(dense.matrix[:, own] @ root, full_matrices=False).Vh[:many]
        filters[place, : len(leading)] = torch.linalg.solve(root, leading, left=False)
    found = filters.flatten(0, 1)
    last = refitted(dense.matrix, dense.second, _spread(dense, found))
    for _ in range(_ROUNDS if len(found) * taps <= _MOST else 0):
        rows = (torch.arange(len(found), device=found.device) // many)[:, None] * taps + torch.arange(taps, device=found.device)
        rows = rows.flatten()  # where in the height each tap of each filter reads
        gram = (last.T @ last).repeat_interleave(taps, 0).repeat_interleave(taps, 1) * dense.second[rows][:, rows]
        pull = (last.T @ dense.matrix @ dense.second).repeat_interleave(taps, 0)[torch.arange(len(rows), device=rows.device), rows]
        found = solved(gram, pull[:, None]).reshape(found.shape)
        last = refitted(dense.matrix, dense.second, _spread(dense, found))
    return found, last


def _spread(dense: Dense, filters: Tensor) -> Tensor:
    """Depthwise filters as a matrix [filters, height]."""
    spread = filters.new_zeros(len(filters), dense.inputs, filters.shape[1])
    place = torch.arange(len(filters), device=filters.device)
    spread[place, place // dense.expansion] = filters
    return spread.flatten(1)


def _balanced(filters: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with each filter as large as the column that reads it."""
    size = (filters.norm(dim=1).clamp_min(1e-30) / last.norm(dim=0).clamp_min(1e-30)).sqrt()
    return filters / size[:, None], last * size


def _grouping(dense: Dense) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs and the columns of each group; the number of groups divides both."""
    rows, columns = (torch.arange(size, device=dense.matrix.device).chunk(dense.groups) for size in dense.matrix.shape)
    return list(rows), list(columns)


def _leading(dense: Dense, count: int) -> Tensor:
    """Leading directions [outputs, count] of the outputs."""
    vectors: Tensor = torch.linalg.eigh(dense.matrix @ dense.second @ dense.matrix.T).eigenvectors
    return vectors[:, -count:]


def _root(gram: Tensor) -> Tensor:
    """A square root [n, n], damped: gram = root @ root.T."""
    values, vectors = torch.linalg.eigh(gram)
    root: Tensor = vectors * values.clamp_min(_DAMP * values.mean().clamp_min(1e-30)).sqrt()
    return root


def _paired(worth: Tensor) -> list[int]:
    """For each row [n, n] a column of its own, the worthiest pairs first."""
    found, free = [-1] * len(worth), worth.clone()
    for _ in range(len(worth)):
        row, column = divmod(int(free.argmax()), len(worth))
        found[row] = column
        free[row], free[:, column] = -1.0, -1.0
    return found
