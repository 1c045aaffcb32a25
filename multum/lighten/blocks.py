"""Putting a block in the place of a layer, and what it costs there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import Graph, Layer
from ..graph.matrix import data, geometry, positions
from ..graph.model import aten, shape
from .fits import Part


def form(layer: Layer) -> dict[str, list[int]] | None:
    """Stride, padding and dilation of a convolution for each dimension of its window; None where zeros are not even on both sides."""
    if layer.kind == "linear":
        return {"stride": [1], "padding": [0], "dilation": [1]}
    _, padding, stride, dilation = geometry(layer)
    even = all(before == after for before, after in padding)
    return {"stride": stride, "padding": [before for before, _ in padding], "dilation": dilation} if even else None


def shape_of(layer: Layer) -> tuple[int, ...]:
    """The window of a convolution; empty for a linear layer."""
    operand = layer.node.args[layer.position]
    assert isinstance(operand, fx.Node)
    return tuple(operand.meta["val"].shape[2:]) if layer.kind == "conv" else ()


def dense_macs(layer: Layer, weight: Tensor) -> int:
    """Multiply-accumulates of the layer in one sample."""
    return weight.numel() * positions(layer)


def block_macs(layer: Layer, parts: Sequence[Part]) -> int:
    """Those of the block: what stands before the window works at the layer's input's positions."""
    total, strided = 0, not any(part.window for part in parts)
    for part in parts:
        strided = strided or part.window
        total += part.weight.numel() * positions(layer, strided)
    return total


def put(graph: Graph, layer: Layer, parts: Sequence[Part], bias: Tensor) -> tuple[fx.Node, list[str]]:
    """Puts the block in the layer's place, in place; gives its last operator and the names of its parameters.

    The new weights are named after the old one: of `conv.weight`, `conv.part0.weight` and so on. A linear layer becomes convolutions
    along the positions, with a window of one.
    """
    node, old, dims = layer.node, graph.tensor(layer.weight), max(1, len(shape_of(layer)))
    base, names = layer.weight.removesuffix(".weight"), list[str]()
    base += "_" if base == layer.weight else ""
    known, value = form(layer), data(layer)
    assert known is not None

    def add(target: Any, *args: Any) -> fx.Node:
        return graph.operator(target, args, node, node)

    def own(part: str, tensor: Tensor, parameter: bool = True) -> fx.Node:
        name = f"{base}.{part}"
        graph.set_tensor(name, tensor.to(old.dtype).contiguous() if parameter else tensor, parameter)
        names.extend([name] if parameter else [])
        return graph.attribute(name, node)

    flat = layer.kind == "linear" and len(shape(value)) == 2
    if layer.kind == "linear":
        value = add(aten.unsqueeze.default, value, 2) if flat else add(aten.transpose.int, value, 1, 2)
    operator = getattr(aten, f"conv{dims}d").default
    for place, part in enumerate(parts):
        last = place == len(parts) - 1
        weight = own(f"part{place}.weight", part.weight)
        shift = _bias(parts, place, bias)
        given = [own(f"part{place}.bias", shift) if shift is not None else None, *_arguments(part, known, shape_of(layer))]
        after = add(operator, value, weight, *given, part.groups)
        if part.order is not None:
            after = add(
                aten.index_select.default, add(aten.cat.default, [value, after], 1), 1, own(f"part{place}.order", part.order, False)
            )
        value = _dealt(graph, after, layer, part, last) if part.shuffle > 1 else after
    if layer.kind == "linear":
        value = add(aten.squeeze.dim, value, 2) if flat else add(aten.transpose.int, value, 1, 2)
    node.replace_all_uses_with(value)
    graph.clean()
    with torch.no_grad():
        graph.refresh()
    return value, names


def _bias(parts: Sequence[Part], place: int, bias: Tensor) -> Tensor | None:
    """The bias of a part: that of the block goes with the last one; where that makes some channels of others, both have their own."""
    order = parts[-1].order
    if order is None:
        return bias if place == len(parts) - 1 else None
    sorted_, kept = bias[order.argsort()], len(parts[-1].weight)  # the kept channels first, then those made of them
    slopes = parts[-1].weight.flatten(1).sum(1).to(bias)
    return sorted_[:kept] if place == len(parts) - 2 else sorted_[kept:] - slopes * sorted_[:kept]


def _arguments(part: Part, known: dict[str, list[int]], window: tuple[int, ...]) -> list[list[int]]:
    """Stride, padding and dilation of a part."""
    sizes = part.weight.shape[2:]
    if not part.window:
        return [[1] * len(sizes), [size // 2 for size in sizes], [1] * len(sizes)]
    dilation = [step * (part.dilation if size > 1 else 1) for size, step in zip(sizes, known["dilation"], strict=True)]
    spans = zip(known["padding"], known["dilation"], window or (1,), dilation, sizes, strict=True)
    padding = [pad - (old * (whole - 1) - new * (size - 1)) // 2 for pad, old, whole, new, size in spans]
    return [known["stride"], padding, dilation]


def _dealt(graph: Graph, value: fx.Node, layer: Layer, part: Part, last: bool) -> fx.Node:
    """Channels [groups, each] in the order [each, groups], `each` in as many groups."""
    count, channels = part.shuffle, len(part.weight)
    sizes = list(shape(layer.node)[2:]) if layer.kind == "conv" else [-1]
    batch: Any = -1 if layer.kind == "conv" else None
    if batch is None:  # positions may be as free as the batch: their number is read
        with graph.fx.inserting_before(layer.node):
            batch = graph.fx.call_function(aten.sym_size.int, (value, 0))
    steps: list[tuple[Any, tuple[Any, ...]]] = [
        (aten.reshape.default, ([batch, count, count, channels // count**2, *sizes],)),
        (aten.transpose.int, (1, 2)),
        (aten.reshape.default, ([batch, channels, *sizes],)),
    ]
    for target, args in steps:
        value = graph.operator(target, (value, *args), value, layer.node)
    return value
