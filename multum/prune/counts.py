"""What would be left after a cut, without cutting: parameters, multiply-accumulates, milliseconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..analyze import Latencies
from ..graph import Graph, Layer
from ..graph.axes import Groups, Keep
from ..graph.axis_trace import Axes


@dataclass(frozen=True, eq=False)
class Term:
    """A part of a cost that depends on the widths of these groups alone."""

    groups: frozenset[str]
    left: Callable[[Keep], float]


def parameter_terms(graph: Graph, groups: Groups) -> list[Term]:
    """The parameters that are left, of each tensor."""
    return [_product(groups, [groups.tensors[name]]) for name, _ in graph.tensors.named_parameters()]


def mac_terms(graph: Graph, groups: Groups) -> list[Term]:
    """The multiply-accumulates of convolutions, linear and recurrent layers that are left, at the example's batch size."""
    found = []
    for layer in groups.layers.values():
        if layer.kind in ("conv", "linear", "rnn"):
            weight = groups.tensors[layer.weight]
            found.append(_product(groups, [weight, _positions(groups, layer, len(weight))]))
    return found


def latency_terms(graph: Graph, groups: Groups) -> list[Term]:
    """The milliseconds of each convolution and linear layer, from times measured on this machine."""
    table, found = Latencies(graph), []
    for layer in groups.layers.values():
        if table.covers(layer):
            weight = groups.tensors[layer.weight]

            def left(keep: Keep, layer: Layer = layer, weight: Axes = weight) -> float:
                return table.ms(layer, [groups.size(axis, keep) for axis in weight])

            found.append(Term(_names(groups, [weight]), left))
    return found


def total(terms: Iterable[Term], keep: Keep) -> float:
    return sum(term.left(keep) for term in terms)


def parameters(graph: Graph, groups: Groups, keep: Keep) -> int:
    """How many parameters are left."""
    return int(total(parameter_terms(graph, groups), keep))


def macs(graph: Graph, groups: Groups, keep: Keep) -> int:
    """The multiply-accumulates that are left, at the example's batch size."""
    return int(total(mac_terms(graph, groups), keep))


def _product(groups: Groups, parts: Sequence[Axes]) -> Term:
    return Term(_names(groups, parts), lambda keep: math.prod(groups.size(axis, keep) for part in parts for axis in part))


def _names(groups: Groups, parts: Sequence[Axes]) -> frozenset[str]:
    return frozenset(group.name for part in parts for axis in part for group in groups.inside(axis))


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
