"""A window of k x k as one of k x 1 and one of 1 x k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..graph import Graph, Layer
from ..graph.matrix import data, refitted
from ..graph.model import shape
from .chain import Link
from .method import Factorization, per_dimension
from .ranks import Curve, one
from .svd import spectrum


@dataclass(frozen=True)
class Spatial(Factorization):
    """Replaces a two-dimensional convolution by one of k x 1 with `rank` filters and one of 1 x k (Jaderberg, Vedaldi & Zisserman 2014).

    The weight as a matrix [outputs * width, inputs * height of the window] is approximated; with calibration data in the measure of the
    second moments of the inputs, and the second convolution is then fitted to the layer's outputs by least squares.
    """

    def reason(self, graph: Graph, layer: Layer) -> str | None:
        size = graph.tensor(layer.weight).shape[2:]
        return None if len(size) == 2 and min(size) > 1 else "its window is not two-dimensional"

    def curve(self, layer: Layer, weight: Tensor, second: Tensor | None, macs: bool) -> Curve:
        outputs, inputs, height, width = weight.shape
        rows, columns = shape(layer.node)[2:]
        first, last = (rows * shape(data(layer))[3], rows * columns) if macs else (1, 1)
        energy = spectrum(_matrix(weight), _by_columns(weight, second))[0]
        return one(energy, weight.numel() * last, inputs * height * first + outputs * width * last)

    def unfoldings(self, layer: Layer, weight: Tensor) -> list[Tensor]:
        return [_matrix(weight)]

    def links(self, layer: Layer, weight: Tensor, second: Tensor | None, ranks: Sequence[int]) -> list[Link]:
        (outputs, inputs, height, width), rank = weight.shape, ranks[0]
        matrix = _matrix(weight)
        inner = spectrum(matrix, _by_columns(weight, second))[1][:, :rank].T @ matrix
        inner = inner / inner.norm(dim=1, keepdim=True).clamp_min(1e-30)
        # what the second convolution reads of a window: for each of its columns the features of that column
        features = torch.einsum("rip,qs->rqips", inner.reshape(rank, inputs, height), torch.eye(width).to(inner))
        outer = refitted(weight.flatten(1), second, features.reshape(rank * width, -1)).reshape(outputs, rank, 1, width)
        root = outer.flatten(2).norm(dim=(0, 2)).sqrt().clamp_min(1e-30)
        inner, outer = inner.reshape(rank, inputs, height, 1) * root[:, None, None, None], outer / root[:, None, None]
        parts = [per_dimension(layer, name) for name in ("stride", "padding", "dilation")]
        ways = [tuple(along(part, dim, other) for part, other in zip(parts, (1, 0, 1), strict=True)) for dim in (0, 1)]
        return [Link(layer.node.target, factor, way) for factor, way in zip((inner, outer), ways, strict=True)]


def along(value: Sequence[int] | str, dim: int, otherwise: int) -> list[int] | str:
    """An argument of a convolution that has it along one dimension only."""
    return value if isinstance(value, str) else [size if other == dim else otherwise for other, size in enumerate(value)]


def _matrix(weight: Tensor) -> Tensor:
    """[outputs * width, inputs * height]."""
    return weight.permute(0, 3, 1, 2).reshape(weight.shape[0] * weight.shape[3], -1)


def _by_columns(weight: Tensor, second: Tensor | None) -> Tensor | None:
    """The second moments of the columns of a window [inputs * height, inputs * height], mean over them."""
    _, inputs, height, width = weight.shape
    if second is None:
        return None
    parts = second.reshape(inputs * height, width, inputs * height, width)
    return parts.diagonal(dim1=1, dim2=3).mean(2)
