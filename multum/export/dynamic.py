"""Activations quantized as they come, their range measured in every call: the operators, and their integer form for export."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import Graph
from ..graph.layers import QUANTIZERS
from ..graph.model import aten

_TOP, _SMALLEST = 255, 1e-12


def quantize_in_calls(graph: Graph, value: fx.Node, readers: list[fx.Node]) -> None:
    """Lets `readers` see a value on the grid of 256 integers between its least and its largest number, zero included."""
    call = graph.fx.call_function
    with graph.fx.inserting_before(readers[0]):
        low = call(aten.clamp_max.default, (call(aten.amin.default, (value,)), 0.0))
        high = call(aten.clamp_min.default, (call(aten.amax.default, (value,)), 0.0))
        scale = call(aten.clamp_min.default, (call(aten.div.Tensor, (call(aten.sub.Tensor, (high, low)), float(_TOP))), _SMALLEST))
        zero = call(aten.round.default, (call(aten.neg.default, (call(aten.div.Tensor, (low, scale)),)),))
        level = call(aten.add.Tensor, (call(aten.round.default, (call(aten.div.Tensor, (value, scale)),)), zero))
        level = call(aten.clamp.default, (level, 0, _TOP))
        made = call(aten.mul.Tensor, (call(aten.sub.Tensor, (level, zero)), scale))
    for reader in readers:
        reader.replace_input_with(value, made)


def quantized_in_calls(node: Any) -> fx.Node | None:
    """The value that a node is on a grid measured in every call; None when it is anything else."""
    chain = (aten.sub.Tensor, aten.clamp.default, aten.add.Tensor, aten.round.default, aten.div.Tensor)
    if not isinstance(node, fx.Node) or node.target is not aten.mul.Tensor:
        return None
    scale, at = node.args[1], node
    for target in chain:
        at = at.args[0]  # type: ignore[assignment]
        if not isinstance(at, fx.Node) or at.target is not target:
            return None
    value = at.args[0]
    measured = isinstance(value, fx.Node) and at.args[1] is scale and any(user.target is aten.amin.default for user in value.users)
    return value if measured else None  # type: ignore[return-value]


def to_integer_products(graph: Graph, weights: Callable[[fx.Node], tuple[Tensor, Tensor] | None]) -> None:
    """Replaces linear layers with a weight on an 8-bit grid and an input quantized in calls by products of integers, in place.

    `weights(node)` gives integers [outputs, inputs] and scales [outputs] of a quantizer, None where its zero points differ from zero.
    """
    made: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.find(aten.linear.default):
        rounded, weight = node.all_input_nodes[:2]
        value = quantized_in_calls(rounded)
        parts = weights(weight) if value is not None and weight.target in QUANTIZERS else None
        if value is None or parts is None:
            continue
        if value not in made:
            with graph.fx.inserting_before(rounded):
                whole = graph.fx.call_function(torch.ops.multum.quantize_in_call.default, (value,))
                made[value] = [graph.fx.call_function(operator.getitem, (whole, index)) for index in range(3)]
        reads = []
        for part, tensor in zip(("columns", "scales"), (parts[0].T.contiguous(), parts[1]), strict=True):
            graph.set_tensor(f"{weight.name}_{part}", tensor, parameter=False)
            reads.append(graph.attribute(f"{weight.name}_{part}", node))
        with graph.fx.inserting_before(node):
            product = graph.fx.call_function(torch.ops.multum.integer_product.default, (*made[value], *reads))
            bias = node.args[2] if len(node.args) > 2 else None
            product = product if bias is None else graph.fx.call_function(aten.add.Tensor, (product, bias))
        node.replace_all_uses_with(product)
        graph.fx.erase_node(node)
    graph.clean()
