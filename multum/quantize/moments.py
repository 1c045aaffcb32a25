"""Second moments of what the weights of a layer meet, measured on calibration data in memory that does not grow with the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..graph import Graph, Layer
from ..graph.matrix import data, from_matrix, geometry, to_matrix
from ..graph.model import aten, read, shape
from ..graph.watch import Watch
from ..task import Task, calibration

_FEWEST, _FOR_EACH = 4096, 16  # input vectors that are looked at: in all, and for each of their entries
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)


@dataclass
class Moments:
    """Sums over the vectors x that the rows of a weight meet, and over x0, the same in the network in float.

    `second` is the sum of x x' and `cross` that of x0 x' [groups, inputs, inputs]; `first` and `first0` are those of x and x0
    [groups, inputs].
    """

    second: Tensor
    cross: Tensor
    first: Tensor
    first0: Tensor
    count: int = 0

    def add(self, x0: Tensor, x: Tensor) -> None:
        """Takes in vectors [groups, n, inputs]."""
        self.second += x.mT @ x
        self.cross += x0.mT @ x
        self.first += x.sum(1)
        self.first0 += x0.sum(1)
        self.count += x.shape[1]

    def matrices(self, centred: bool) -> tuple[Tensor, Tensor]:
        """The means of x x' and of x0 x' [groups, inputs, inputs]; centred when the bias makes up for the means."""
        second, cross = self.second / self.count, self.cross / self.count
        if centred:
            first, first0 = self.first / self.count, self.first0 / self.count
            second = second - first[:, :, None] * first[:, None, :]
            cross = cross - first0[:, :, None] * first[:, None, :]
        return second, cross


def as_rows(value: Tensor, layer: Layer) -> Tensor:
    """A weight, or something of its shape, as rows that multiply input vectors [groups, rows, inputs]."""
    if layer.node.target in TRANSPOSED:
        return value.reshape(int(read(layer.node, "groups", 1)), -1, *value.shape[1:]).flatten(2).mT
    return to_matrix(layer, value)


def from_rows(rows: Tensor, layer: Layer, like: Tensor) -> Tensor:
    """The inverse of `as_rows`, in the shape of `like`."""
    return rows.mT.reshape(like.shape) if layer.node.target in TRANSPOSED else from_matrix(layer, rows, like.shape)


def gather(graph: Graph, original: Graph, pairs: Sequence[tuple[Layer, Layer]], task: Task, samples: int) -> dict[Layer, Moments]:
    """The moments of what layers of `graph` meet, next to what their twins in `original` meet.

    A weight that several layers use has one entry, under the first of them. Of each sample some positions are looked at, evenly
    spread, and other ones in other batches.
    """
    places: dict[fx.Node, list[Layer]] = {}
    places0: dict[fx.Node, list[Layer]] = {}
    for layer, twin in pairs:
        places.setdefault(data(layer), []).append(layer)
        places0.setdefault(data(twin), []).append(layer)
    kept: dict[Layer, Tensor] = {}
    first: dict[str, Layer] = {}
    for layer, _ in pairs:
        first.setdefault(layer.weight, layer)
    found: dict[Layer, Moments] = {}
    turn = 0

    def note(node: fx.Node, value: Tensor) -> None:
        kept.update((layer, vectors(value, layer, samples, turn)) for layer in places0[node])

    def see(node: fx.Node, value: Tensor) -> None:
        for layer in places[node]:
            x, leader = vectors(value, layer, samples, turn), first[layer.weight]
            if leader not in found:
                square, line = x.new_zeros(len(x), x.shape[-1], x.shape[-1]), x.new_zeros(len(x), x.shape[-1])
                found[leader] = Moments(square, square.clone(), line, line.clone())
            found[leader].add(kept.pop(layer), x)

    watch0, watch = Watch(original, places0, note), Watch(graph, places, see)
    with torch.inference_mode():
        for turn, inputs in enumerate(calibration(task, samples)):  # noqa: B007
            watch0(inputs)
            watch(inputs)
    return found


def vectors(x: Tensor, layer: Layer, samples: int, turn: int) -> Tensor:
    """Vectors that the rows of the layer's weight meet when it is given x [groups, n, inputs]."""
    if layer.kind == "linear":
        x = x.reshape(len(x), -1, x.shape[-1]).mT if x.ndim > 1 else x[None, :, None]
        groups, kernel, padding, stride, dilation = 1, [1], [(0, 0)], [1], [1]
    else:
        groups, (kernel, padding, stride, dilation) = int(read(layer.node, "groups", 1)), _geometry(layer)
    size = len(kernel)
    if any(map(any, padding)):
        x = F.pad(x, [amount for pair in reversed(padding) for amount in pair])
    for dim in range(size):
        x = x.unfold(2 + dim, dilation[dim] * (kernel[dim] - 1) + 1, stride[dim])[..., :: dilation[dim]]
    wanted = max(_FEWEST, _FOR_EACH * math.prod(kernel) * x.shape[1] // groups) / samples
    step = max(1, int((math.prod(x.shape[2 : 2 + size]) / wanted) ** (1 / size)))
    for dim in range(2, 2 + size):
        x = x[(slice(None),) * dim + (slice(turn % min(step, x.shape[dim]), None, step),)]
    x = x.reshape(x.shape[0], groups, -1, *x.shape[2:])  # [n, groups, channels, positions ..., kernel ...]
    x = x.movedim(2, 2 + size).movedim(1, 0)
    return x.reshape(groups, math.prod(x.shape[1 : 2 + size]), -1)


def _geometry(layer: Layer) -> tuple[list[int], list[tuple[int, int]], list[int], list[int]]:
    """As `graph.matrix.geometry`. Each entry of a transposed kernel is a row of its own: where they overlap in the outputs is left out."""
    size = len(shape(data(layer))) - 2
    return ([1] * size, [(0, 0)] * size, [1] * size, [1] * size) if layer.node.target in TRANSPOSED else geometry(layer)
