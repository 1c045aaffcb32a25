"""Weights with as many values below zero as above and none at zero, trained behind their rounding: one bit is a sign, two are four values.

They are the odd integers from 1 - 2^bits to 2^bits - 1 times a scale for each channel, which follows the weights: after a step it has the
least squared error, for one bit the mean magnitude (Rastegari et al. 2016, "XNOR-Net", section 3.1). Gradients pass the rounding
straight through; weights are kept where they do (Courbariaux et al. 2015, "BinaryConnect", sections 2.3 and 2.4).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..graph import Graph, Layer
from ..graph.model import aten
from ..train import Companion
from .grid import SMALLEST_SCALE, Grid, signed
from .insert import quantize_weight

_QUANTIZER = aten.fake_quantize_per_channel_affine.default
_FITS = 8  # of scale and integers to each other, to begin with
_INSIDE = 0.999  # of the range in which gradients pass


def odd_integers(x: Tensor, scale: Tensor, bits: int, axis: int) -> Tensor:
    """The odd integers of `bits` bits nearest to x / scale, with a scale [channels] in dimension `axis`; of x's shape."""
    most = (1 << bits) - 1
    return (2 * torch.floor(x / Grid(-most, most, axis).broadcast(scale, x.ndim) / 2) + 1).clamp(-most, most)


def fitted(x: Tensor, scale: Tensor, bits: int, axis: int) -> Tensor:
    """The scale [channels] with the least squared error for the integers q that `scale` gives: <x, q> / <q, q>."""
    q, others = odd_integers(x, scale, bits, axis), [dim for dim in range(x.ndim) if dim != axis]
    return ((x * q).sum(others) / (q * q).sum(others)).clamp_min(SMALLEST_SCALE)


class Midrise(Companion):
    """The weights of some layers, of `bits` bits from `join` until `settle`."""

    def __init__(self, chosen: Sequence[Layer], bits: int):
        self.bits, self.key = bits, f"midrise {bits}"
        self.chosen = list({layer.weight: layer for layer in reversed(chosen)}.values())

    def quantize(self, graph: Graph) -> None:
        """Reads the weights through their quantizers wherever the graph reads them."""
        for layer in self.chosen:
            weight = graph.tensor(layer.weight).detach()
            others = [dim for dim in range(weight.ndim) if dim != layer.scale_axis]
            scale = (weight.abs().mean(others) / (1 << self.bits - 1)).clamp_min(SMALLEST_SCALE)
            for _ in range(_FITS):
                scale = fitted(weight, scale, self.bits, layer.scale_axis)
            graph.set_tensor(f"{layer.weight}_scale", 2 * scale, parameter=False)
            graph.set_tensor(f"{layer.weight}_zero_point", torch.full_like(scale, ((1 << self.bits) - 1) / 2), parameter=False)
            reads = [node for node in graph.fx.nodes if node.op == "get_attr" and node.target == layer.weight]
            after = reads[0].next
            rest = [graph.attribute(f"{layer.weight}_{name}", after) for name in ("scale", "zero_point")]
            args = (reads[0], *rest, layer.scale_axis, 0, (1 << self.bits) - 1)
            quantizer = graph.operator(_QUANTIZER, args, reads[0], after)
            quantizer.meta["module"] = layer.name
            for node in reads:
                node.replace_all_uses_with(quantizer, lambda user, own=quantizer: user is not own)
        graph.recompile()

    def join(self, graph: Graph) -> None:
        self.graph = graph

    def after(self, step: int, steps: int) -> None:
        for layer in self.chosen:
            weight, double = self.graph.tensor(layer.weight), self.graph.tensor(f"{layer.weight}_scale")
            reach = Grid(0, 0, layer.scale_axis).broadcast(double * (_INSIDE * (1 << self.bits - 1)), weight.ndim)
            weight.copy_(torch.clamp(weight, -reach, reach))
            double.copy_(2 * fitted(weight, double / 2, self.bits, layer.scale_axis))

    def settle(self, graph: Graph) -> None:
        """Puts the weights on plain integers, which files and engines know: those of one bit more, of which only odd ones occur."""
        for layer in self.chosen:
            weight, scale = graph.tensor(layer.weight).detach(), graph.tensor(f"{layer.weight}_scale") / 2
            quantizer = layer.quantizer()
            assert quantizer is not None
            quantizer.replace_all_uses_with(quantizer.all_input_nodes[0])
            graph.fx.erase_node(quantizer)
            q = odd_integers(weight, scale, self.bits, layer.scale_axis)
            quantize_weight(graph, layer, self.bits + 1, scale)
            graph.set_tensor(layer.weight, q * signed(self.bits + 1, layer.scale_axis).broadcast(scale, weight.ndim))
        graph.clean()
