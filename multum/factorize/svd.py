"""Two thin layers for one, by singular values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..graph import Layer
from ..graph.matrix import positions
from ..graph.model import aten
from .chain import Link
from .method import Factorization
from .ranks import Curve, one


@dataclass(frozen=True)
class SVD(Factorization):
    """Replaces a layer of weight W [outputs, height] by two, of `rank` columns and rows: the best approximation (Eckart and Young 1936).

    With calibration data it is the best for the layer's outputs on them: U U^T W with the leading eigenvectors U of W S W^T, where S
    are the second moments of what the layer reads (the optimum that whitening gives; Wang et al. 2024, "SVD-LLM", section 3.1).
    A convolution becomes one with `rank` filters of the same window, stride and padding, and a 1x1 convolution (Zhang et al. 2015,
    section 3.1); an embedding, a narrower one and a linear layer. A layer for which two cost no less than one stays, and
    so do layers with groups, transposed ones and those that share their weight. Training afterwards (`distill.Logits`) learns back more.
    """

    kinds: ClassVar[Sequence[str]] = ("conv", "linear", "embedding")

    def curve(self, layer: Layer, weight: Tensor, second: Tensor | None, macs: bool) -> Curve:
        matrix, factor = weight.flatten(1), positions(layer) if macs else 1
        return one(spectrum(matrix, second)[0], matrix.numel() * factor, sum(matrix.shape) * factor)

    def unfoldings(self, layer: Layer, weight: Tensor) -> list[Tensor]:
        return [weight.flatten(1)]

    def links(self, layer: Layer, weight: Tensor, second: Tensor | None, ranks: Sequence[int]) -> list[Link]:
        matrix = weight.flatten(1)
        outer = spectrum(matrix, second)[1][:, : ranks[0]]
        inner = outer.T @ matrix
        root = inner.norm(dim=1, keepdim=True).sqrt().clamp_min(1e-30)
        outer, inner = outer * root.T, inner / root
        if layer.kind == "embedding":
            return [Link(aten.embedding.default, inner.T, tuple(layer.node.args[2:])), Link(aten.linear.default, outer)]
        if layer.kind == "linear":
            return [Link(aten.linear.default, inner), Link(aten.linear.default, outer)]
        point = getattr(aten, f"conv{weight.ndim - 2}d").default
        window = inner.reshape(-1, *weight.shape[1:])
        return [
            Link(layer.node.target, window, tuple(layer.node.args[3:])),
            Link(point, outer.reshape(*outer.shape, *[1] * (weight.ndim - 2))),
        ]


def spectrum(matrix: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor]:
    """The energy of a matrix [outputs, height], or of its outputs on inputs with these second moments, by leading directions.

    Columns that stand alone count by how often they are met [height]. Gives min(outputs, height) energies, largest first, and the
    directions [outputs, that many].
    """
    count = min(matrix.shape)
    if second is not None and second.ndim == 1:
        matrix, second = matrix * second.sqrt(), None
    if second is None and matrix.shape[0] > matrix.shape[1]:
        left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        return values.square(), left
    values, vectors = torch.linalg.eigh(matrix @ matrix.T if second is None else matrix @ second.double() @ matrix.T)
    return values.flip(0)[:count].clamp_min(0), vectors.flip(1)[:, :count]
