"""Operators that together are one convolution or one linear layer: sums of branches, chains, normalizations in use, averages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..graph import Graph, Layer, layers
from ..graph.matrix import data
from ..graph.model import aten, read, shape
from .blocks import form

_AVERAGES = (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)


@dataclass(frozen=True, eq=False)
class Affine:
    """What operators make of `source`: a convolution, in double precision; a linear layer where `weight` is a matrix.

    `weight` [outputs, inputs of a group, window], `bias` [outputs]; stride, padding and dilation for each dimension of the window.
    `layers` are the layers among the operators, `sums` how many branches were added.
    """

    source: fx.Node
    weight: Tensor
    bias: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    layers: tuple[Layer, ...] = ()
    sums: int = 0

    @property
    def point(self) -> bool:
        """Whether each output place reads the same place alone, each place once."""
        return all(size == 1 for size in self.weight.shape[2:]) and set(self.stride) <= {1} and set(self.padding) <= {0}


def affine(graph: Graph, node: fx.Node, known: Mapping[fx.Node, Layer]) -> Affine | None:
    """The one layer that `node` and what it alone reads are in eval mode; None when they are none."""
    if node in known:
        own = _own(graph, known[node])
        before = own and _alone(graph, own.source, known)
        return own if not own or before is None else chained(before, own) or own
    if node.target is aten.batch_norm.default and node.name not in graph.pinned and node.args[3] is not None:
        given = node.args[0]
        assert isinstance(given, fx.Node)
        inner = _alone(graph, given, known) or _identity(graph, given)
        return None if inner is None else _normalized(graph, node, inner)
    if node.target is aten.add.Tensor and len(node.all_input_nodes) == 2 and not node.kwargs:
        one, other = node.all_input_nodes
        a, b = (_alone(graph, part, known) for part in (one, other))
        if a is None or b is None:  # one may be the input itself
            a, b = (
                a or (_identity(graph, one) if b and b.source is one else None),
                b or (_identity(graph, other) if a and a.source is other else None),
            )
        return added(a, b) if a and b and shape(one) == shape(other) else None
    if (
        node.target in _AVERAGES
        and not read(node, "ceil_mode")
        and read(node, "count_include_pad")
        and read(node, "divisor_override") is None
    ):
        given = node.args[0]
        assert isinstance(given, fx.Node)
        inner = _alone(graph, given, known)
        return inner and chained(inner, _average(node, inner))
    return None


def plain_layers(graph: Graph) -> dict[fx.Node, Layer]:
    """The layers that are read as they are stored: convolutions and linear layers with a weight of their own."""
    found = {}
    for layer in layers(graph):
        operand = layer.node.args[layer.position] if layer.position < len(layer.node.args) else None
        plain = (layer.kind == "conv" and layer.axis == 0 and form(layer) is not None) or layer.node.target is aten.linear.default
        if plain and isinstance(operand, fx.Node) and operand.op == "get_attr" and len(operand.users) == 1 and not layer.node.kwargs:
            found[layer.node] = layer
    return found


def macs(found: Affine, node: fx.Node) -> tuple[int, int]:
    """Multiply-accumulates of one sample: of the layers as they are, and of the one that they would be."""

    def positions(at: fx.Node, linear: bool) -> int:
        return math.prod(shape(at)[1:-1] if linear else shape(at)[2:])

    now = sum(_size(layer) * positions(layer.node, layer.kind == "linear") for layer in found.layers)
    return now, found.weight.numel() * positions(node, found.weight.ndim == 2)


def chained(first: Affine, then: Affine) -> Affine | None:
    """Both after each other, where that is one layer of the larger of their windows; None where it is not.

    One of them must be a point. When it is the first, its bias must be zero or `then` without padding: padding adds zeros, not biases.
    """
    if first.groups != 1 or then.groups != 1:
        return None
    outer, inner = (
        then.weight.flatten(2) if then.weight.ndim > 2 else then.weight[..., None],
        first.weight.reshape(*first.weight.shape[:2], -1),
    )
    bias = then.bias + outer.sum(2) @ first.bias
    joined: dict[str, Any] = {"layers": (*first.layers, *then.layers), "sums": first.sums + then.sums, "bias": bias}
    if then.point:
        weight = torch.einsum("om,mit->oit", outer[..., 0], inner).reshape(-1, *first.weight.shape[1:])
        return replace(first, weight=weight, **joined)
    if first.point and (not bool(first.bias.any()) or set(then.padding) <= {0}):
        weight = torch.einsum("omt,mi->oit", outer, inner[..., 0]).reshape(-1, first.weight.shape[1], *then.weight.shape[2:])
        return replace(then, source=first.source, weight=weight, **joined)
    return None


def added(one: Affine, other: Affine) -> Affine | None:
    """The sum of both, where they read the same and their windows lie over each other; None where they do not."""
    if one.source is not other.source or one.groups != other.groups or one.stride != other.stride or one.weight.ndim != other.weight.ndim:
        return None
    geometry = []
    for own, its in zip(_spans(one), _spans(other), strict=True):
        geometry.append(max(own, its))
    weights = []
    for part in (one, other):
        pads = list[int]()
        for (size, padding, dilation), (width, lead, step) in zip(geometry, _spans(part), strict=True):
            before, rest = divmod(padding - lead, dilation)
            if rest or 2 * before != size - width or (width > 1 and step != dilation):
                return None
            pads = [before, size - width - before, *pads]
        weights.append(F.pad(part.weight, pads))
    _, paddings, dilations = zip(*geometry, strict=True) if geometry else ((), (), ())
    return Affine(
        one.source, weights[0] + weights[1], one.bias + other.bias, one.stride, tuple(paddings), tuple(dilations), one.groups,
        (*one.layers, *other.layers), one.sums + other.sums + 1,
    )  # fmt: skip


def _spans(part: Affine) -> list[tuple[int, int, int]]:
    """Size of the window, padding and dilation, for each dimension."""
    return list(zip(part.weight.shape[2:], part.padding, part.dilation, strict=True))


def _alone(graph: Graph, node: fx.Node, known: Mapping[fx.Node, Layer]) -> Affine | None:
    """`affine` of a node whose result is read once."""
    return affine(graph, node, known) if node.op == "call_function" and len(node.users) == 1 else None


def _own(graph: Graph, layer: Layer) -> Affine:
    weight = graph.tensor(layer.weight).detach().double()
    bias = graph.tensor(layer.bias).detach().double() if layer.bias else weight.new_zeros(len(weight))
    if layer.kind == "linear":
        return Affine(data(layer), weight, bias, (), (), (), layers=(layer,))
    known = form(layer)
    assert known is not None
    stride, padding, dilation = (tuple(known[name]) for name in ("stride", "padding", "dilation"))
    return Affine(data(layer), weight, bias, stride, padding, dilation, int(read(layer.node, "groups")), (layer,))


def _identity(graph: Graph, node: fx.Node) -> Affine | None:
    """What leaves [n, channels, ...] as it is."""
    sizes = shape(node)
    if len(sizes) < 3:
        return None
    dims, weight = len(sizes) - 2, torch.eye(sizes[1], dtype=torch.double, device=_device(graph))
    ones, zeros = (1,) * dims, (0,) * dims
    return Affine(node, weight.reshape(*weight.shape, *ones), weight.new_zeros(len(weight)), ones, zeros, ones)


def _normalized(graph: Graph, node: fx.Node, inner: Affine) -> Affine | None:
    if any(part is not None and not (isinstance(part, fx.Node) and part.op == "get_attr") for part in node.args[1:5]):
        return None
    gamma, beta, mean, variance = (
        graph.tensor(str(part.target)).detach().double() if isinstance(part, fx.Node) else None for part in node.args[1:5]
    )
    assert mean is not None
    assert variance is not None
    factor = torch.rsqrt(variance + read(node, "eps")) * (1 if gamma is None else gamma)
    bias = (inner.bias - mean) * factor + (0 if beta is None else beta)
    return replace(inner, weight=inner.weight * factor.reshape(-1, *[1] * (inner.weight.ndim - 1)), bias=bias)


def _average(node: fx.Node, inner: Affine) -> Affine:
    """An average over windows, as a convolution of each channel with itself."""
    dims, channels = inner.weight.ndim - 2, len(inner.weight)
    given: list[Any] = [node.args[1], read(node, "stride") or node.args[1], read(node, "padding")]
    size, stride, padding = (list(value) * (dims // len(value)) for value in given)
    weight = torch.eye(channels, dtype=torch.double, device=inner.weight.device).reshape(channels, channels, *[1] * dims)
    weight = weight.expand(channels, channels, *size) / math.prod(size)
    return Affine(node, weight, weight.new_zeros(channels), tuple(stride), tuple(padding), (1,) * dims)


def _size(layer: Layer) -> int:
    operand = layer.node.args[layer.position]
    assert isinstance(operand, fx.Node)
    return int(operand.meta["val"].numel())


def _device(graph: Graph) -> torch.device:
    return next((tensor.device for _, tensor in graph.named_tensors()), torch.device("cpu"))
