"""A convolution between two that change the number of channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..graph import Graph, Layer
from ..graph.matrix import data, lower_factor, positions, refitted
from ..graph.model import aten, shape
from .chain import Link
from .method import Factorization
from .ranks import Curve, two
from .svd import spectrum

_DAMP = 1e-4  # of the mean power of a channel, added to all


@dataclass(frozen=True)
class Tucker(Factorization):
    """Replaces a convolution by a 1x1 one to fewer channels, one of its own window between fewer channels, and a 1x1 one back.

    A Tucker-2 decomposition (Kim et al. 2016, "Compression of deep convolutional neural networks", section 3), by its leading directions on
    each side (De Lathauwer et al. 2000). With calibration data the directions are those of what is read and given there, and the last
    convolution is fitted to the layer's outputs by least squares.
    """

    def reason(self, graph: Graph, layer: Layer) -> str | None:
        return None if graph.tensor(layer.weight)[0, 0].numel() > 1 else "its window is a point: factorize.SVD is for that"

    def curve(self, layer: Layer, weight: Tensor, second: Tensor | None, macs: bool) -> Curve:
        outputs, inputs, window = weight.shape[0], weight.shape[1], weight[0, 0].numel()
        before, after = (prod(shape(data(layer))[2:]), positions(layer)) if macs else (1, 1)
        energies = _inner(weight, second)[0], spectrum(weight.flatten(1), second)[0]
        return two(energies, weight.numel() * after, (inputs * before, window * after, outputs * after))

    def unfoldings(self, layer: Layer, weight: Tensor) -> list[Tensor]:
        return [weight.transpose(0, 1).flatten(1), weight.flatten(1)]

    def links(self, layer: Layer, weight: Tensor, second: Tensor | None, ranks: Sequence[int]) -> list[Link]:
        _, down, up = _inner(weight, second)
        down, up = down[: ranks[0]], up[:, : ranks[0]]
        outer = spectrum(weight.flatten(1), second)[1][:, : ranks[1]]
        core = torch.einsum("os,oik,ir->srk", outer, weight.flatten(2), up)
        core = core / core.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None]
        features = torch.einsum("srk,ri->sik", core, down).flatten(1)
        outer = refitted(weight.flatten(1), second, features)
        root = outer.norm(dim=0).sqrt().clamp_min(1e-30)
        core, outer = core * root[:, None, None], outer / root
        point, ones = getattr(aten, f"conv{weight.ndim - 2}d").default, [1] * (weight.ndim - 2)
        return [
            Link(point, down.reshape(*down.shape, *ones)),
            Link(layer.node.target, core.reshape(*core.shape[:2], *weight.shape[2:]), tuple(layer.node.args[3:])),
            Link(point, outer.reshape(*outer.shape, *ones)),
        ]


def _inner(weight: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The energy by leading directions of the input channels [inputs], the map to these directions [inputs, inputs], and back."""
    pulled = torch.einsum("oik,ojk->ij", weight.flatten(2), weight.flatten(2))
    root = rooted(weight, second)
    values, vectors = torch.linalg.eigh(root.T @ pulled @ root)
    vectors = vectors.flip(1)
    down = torch.linalg.solve_triangular(root.T, vectors, upper=True).T
    sizes = down.norm(dim=1, keepdim=True)
    return values.flip(0).clamp_min(0), down / sizes, root @ vectors * sizes.T


def rooted(weight: Tensor, second: Tensor | None) -> Tensor:
    """The lower triangular root of the second moments of the input channels [inputs, inputs], mean over the window; else one."""
    inputs, window = weight.shape[1], weight[0, 0].numel()
    eye = torch.eye(inputs, dtype=weight.dtype, device=weight.device)
    power = eye if second is None else second.double().reshape(inputs, window, inputs, window).diagonal(dim1=1, dim2=3).mean(2)
    return lower_factor(power + _DAMP * power.diagonal().mean().clamp_min(1e-30) * eye)
