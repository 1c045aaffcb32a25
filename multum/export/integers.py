"""Fake quantization as engines run it: weights that are integers, and operators that a translation to ONNX knows."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import ExportError
from ..graph import Graph
from ..graph.file import grid, to_integers
from ..graph.layers import QUANTIZERS
from ..graph.model import aten, owners, read
from .dynamic import to_integer_products

_KINDS = (torch.uint8, torch.int8, torch.uint16, torch.int16)


@cache
def library() -> Any:
    """Defines the operators that stand for an integer weight and a quantized activation during export; they are never run."""
    library = torch.library.Library("multum", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define("dequantize(Tensor integers, Tensor scale, Tensor zero, int axis) -> Tensor")  # type: ignore[no-untyped-call]
    library.impl("dequantize", lambda q, scale, *_: torch.empty_like(q, dtype=scale.dtype), "Meta")  # type: ignore[no-untyped-call]
    library.define("fake_quantize(Tensor x, Tensor scale, Tensor zero, int low, int high) -> Tensor")  # type: ignore[no-untyped-call]
    library.impl("fake_quantize", lambda x, *_: torch.empty_like(x), "Meta")  # type: ignore[no-untyped-call]
    library.define("quantize_in_call(Tensor x) -> (Tensor, Tensor, Tensor)")  # type: ignore[no-untyped-call]
    library.impl("quantize_in_call", _in_call, "Meta")  # type: ignore[no-untyped-call]
    library.define("integer_product(Tensor q, Tensor scale, Tensor zero, Tensor columns, Tensor scales) -> Tensor")  # type: ignore[no-untyped-call]
    library.impl("integer_product", _product, "Meta")  # type: ignore[no-untyped-call]
    return library


def _in_call(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.uint8), x.new_empty(()), x.new_empty((), dtype=torch.uint8)


def _product(q: Tensor, scale: Tensor, zero: Tensor, columns: Tensor, scales: Tensor) -> Tensor:
    return scales.new_empty((*q.shape[:-1], columns.shape[1]))


def kind(low: int, high: int) -> torch.dtype | None:
    """The smallest integer type that holds `low` to `high`, unsigned first; None above 16 bits."""
    return next((t for t in _KINDS if torch.iinfo(t).min <= low and high <= torch.iinfo(t).max), None)


def to_integer_weights(graph: Graph) -> None:
    """Replaces, in place, each quantized weight by its integers and one `multum::dequantize`, each quantized activation by a
    `multum::fake_quantize` with a scalar scale and a zero point of its integer type; products with inputs quantized in calls by such."""
    library()

    def columns(node: fx.Node) -> tuple[Tensor, Tensor] | None:
        value = _value(graph, node.args[0])
        scale, zero, low, high = grid(graph, node, value.ndim)
        exact = scale.shape[1:].numel() == 1 and not zero.any() and low >= -128 and high <= 127
        return (to_integers(value, graph, node), scale.flatten()) if exact else None

    to_integer_products(graph, columns)
    made: dict[Any, fx.Node] = {}
    for node in list(graph.fx.nodes):
        if node.target not in QUANTIZERS:
            continue
        key = tuple(getattr(part, "target", part) for part in node.args[:6])
        if not _constant(node.args[0]):
            _activation(graph, node)
        elif key in made:  # the same weight on the same grid, such as a table that is tied to the head
            node.replace_all_uses_with(made[key])
        else:
            made[key] = _weight(graph, node)
    graph.clean()


def _weight(graph: Graph, node: fx.Node) -> fx.Node:
    value = _value(graph, node.args[0])
    scale, zero, low, high = grid(graph, node, value.ndim)
    integers = to_integers(value, graph, node)
    times = 1 if zero.any() else finer(node, integers)
    integers, scale = integers * times, scale / times
    axis = read(node, "axis", 0)
    name = str(node.args[0].target) if node.args[0].op == "get_attr" else node.name  # type: ignore[union-attr]
    if f"{name}_integers" in dict(graph.named_tensors()):  # the same weight on another grid
        name = f"{name}_{node.name}"
    one = read(node, "axis") is None or bool((scale == scale.flatten()[:1]).all() and (zero == zero.flatten()[:1]).all())
    parts = {
        "integers": integers,
        "scale": scale.flatten()[0] if one else scale.flatten(),
        "zero": _rounded(zero, low, high).to(integers.dtype).flatten()[0 if one else slice(None)],
    }
    reads = [_buffer(graph, f"{name}_{part}", tensor, node) for part, tensor in parts.items()]
    for user in list(node.users):
        if user.target is aten.embedding.default and user.args[0] is node:
            _rows(graph, user, reads[0], scale, _rounded(zero, low, high), name)
    with graph.fx.inserting_before(node):
        whole = graph.fx.call_function(torch.ops.multum.dequantize.default, (*reads, axis))
    whole.meta = dict(node.meta)
    node.replace_all_uses_with(whole)
    return whole


def finer(node: fx.Node, integers: Tensor) -> int:
    """By what power of two to multiply integers that meet activations of few bits: engines round biases to multiples of both scales.

    One where they meet none, or fill their type.
    """
    library()
    kinds, reach = (*QUANTIZERS, torch.ops.multum.fake_quantize.default), int(integers.abs().max()) if integers.numel() else 0
    inputs = [part for user in node.users for part in user.all_input_nodes if part is not node and part.target in kinds]
    few = [part for part in inputs if not _constant(part.args[0]) and int(part.args[4]) - int(part.args[3]) < 255]  # type: ignore[arg-type]
    return 1 << max(0, (127 // reach).bit_length() - 1) if few and 0 < reach <= 127 else 1


def four_bits(integers: Any) -> bool:
    """Whether these integers, a tensor or an array, are within -8 ... 7."""
    return 0 not in integers.shape and bool(integers.min() >= -8 and integers.max() <= 7)


def _rows(graph: Graph, lookup: fx.Node, integers: fx.Node, scale: Tensor, zero: Tensor, name: str) -> None:
    """Looks rows up among the integers and scales those alone, so that the table is never expanded; of 4 bits two are in a byte."""

    def along(tensor: Tensor, part: str) -> fx.Node:  # [rows, 1] is looked up like the table, [1, columns] and [1, 1] are as they are
        read = _buffer(graph, f"{name}_{part}", tensor.expand(-1, 1) if tensor.shape[0] > 1 else tensor.reshape(-1), lookup)
        return graph.fx.call_function(aten.embedding.default, (read, lookup.args[1])) if tensor.shape[0] > 1 else read

    scale, zero = (tensor.reshape(1, 1) if not tensor.ndim else tensor for tensor in (scale, zero))
    levels = graph.tensor(str(integers.target))
    half, paired = levels.shape[1] // 2, four_bits(levels) and levels.shape[1] % 2 == 0
    if paired:
        left, right = ((part + 8).to(torch.uint8) for part in (levels[:, :half], levels[:, half:]))
        integers = _buffer(graph, f"{name}_pairs", left + 16 * right, lookup)
    with graph.fx.inserting_before(lookup):
        rows = graph.fx.call_function(aten.embedding.default, (integers, *lookup.args[1:]))
        rows = graph.fx.call_function(aten._to_copy.default, (rows,), {"dtype": scale.dtype})
        if paired:  # in arithmetic that every engine has: BitShift goes wrong in OpenVINO 2026.4
            high = graph.fx.call_function(aten.floor.default, (graph.fx.call_function(aten.mul.Tensor, (rows, 1 / 16)),))
            low = graph.fx.call_function(aten.sub.Tensor, (rows, graph.fx.call_function(aten.mul.Tensor, (high, 16.0))))
            rows = graph.fx.call_function(aten.cat.default, ([low, high], -1))
            rows = graph.fx.call_function(aten.sub.Tensor, (rows, 8.0))
        if zero.any():
            rows = graph.fx.call_function(aten.sub.Tensor, (rows, along(zero.to(scale.dtype), "row_zero")))
        rows = graph.fx.call_function(aten.mul.Tensor, (rows, along(scale, "row_scale")))
    lookup.replace_all_uses_with(rows)
    graph.fx.erase_node(lookup)


def _activation(graph: Graph, node: fx.Node) -> None:
    scale, zero, low, high = grid(graph, node, 0)
    integer = kind(low, high)
    if integer is None or scale.numel() != 1:
        what = f"is quantized to {low}..{high}" if integer is None else f"has {scale.numel()} scales"
        raise ExportError(f"An activation of {owners([node])!r} {what}.", "one scale and at most 16 bits, which ONNX can express")
    # Quantizers that share a scale go on sharing it: engines pass integers through a concatenation only then.
    names = [str(read(node, part).target) for part in ("scale", "zero_point")]
    reads = [
        _buffer(graph, f"{names[0]}_scalar", scale.reshape(()), node),
        _buffer(graph, f"{names[1]}_{str(integer).removeprefix('torch.')}", _rounded(zero, low, high).to(integer).reshape(()), node),
    ]
    with graph.fx.inserting_before(node):
        scalar = graph.fx.call_function(torch.ops.multum.fake_quantize.default, (node.args[0], *reads, low, high))
    scalar.meta = dict(node.meta)
    node.replace_all_uses_with(scalar)


def _rounded(zero: Tensor, low: int, high: int) -> Tensor:
    return torch.round(zero.double()).clamp(low, high)


def _buffer(graph: Graph, name: str, value: Tensor, before: fx.Node) -> fx.Node:
    graph.set_tensor(name, value.contiguous(), parameter=False)
    return graph.attribute(name, before)


def _constant(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op != "placeholder" and all(_constant(part) for part in node.all_input_nodes)


def _value(graph: Graph, node: Any) -> Tensor:
    """What a node that depends on no input computes."""
    if node.op == "get_attr":
        return graph.tensor(str(node.target)).detach()
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda part: _value(graph, part))
    return node.target(*args, **kwargs)  # type: ignore[no-any-return]
