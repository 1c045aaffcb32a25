"""What would be left after a cut, without cutting: parameters and multiply-accumulates."""

from __future__ import annotations

import math

from ..graph import Graph, Layer
from ..graph.axes import Groups, Keep
from ..graph.axis_trace import Axes


def parameters(graph: Graph, groups: Groups, keep: Keep) -> int:
    """How many parameters are left."""
    names = [name for name, _ in graph.tensors.named_parameters()]
    return sum(math.prod(groups.size(axis, keep) for axis in groups.tensors[name]) for name in names)


def macs(graph: Graph, groups: Groups, keep: Keep) -> int:
    """The multiply-accumulates of convolutions, linear and recurrent layers that are left, at the example's batch size."""
    total = 0
    for layer in groups.layers.values():
        if layer.kind in ("conv", "linear", "rnn"):
            weight = groups.tensors[layer.weight]
            total += math.prod(groups.size(axis, keep) for axis in (*weight, *_positions(groups, layer, len(weight))))
    return total


def _positions(groups: Groups, layer: Layer, weight_dims: int) -> Axes:
    """The axes over which the whole weight is used again and again."""
    given = groups.results[layer.node.all_input_nodes[0]]
    if layer.kind == "rnn":
        return given[:2]
    outputs = groups.results[layer.node]
    if layer.kind == "linear":
        return outputs[:-1]
    slid = given if layer.axis == 1 else outputs  # a transposed convolution places its window once for each input
    channel = len(slid) - weight_dims + 1
    return (*slid[:channel], *slid[channel + 1 :])
