"""What the channels of a group are: heads, neurons, a residual stream ..."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx

from .axis import Axis, atoms
from .axis_trace import Axes, Trace
from .layers import Layer
from .model import Graph, aten

# kind -> what one channel of such a group is
KINDS = {
    "heads": "a head of attention; where key-value heads are shared, one of them with all its query heads",
    "queries": "where key-value heads are shared, one query head of each",
    "width": "one number within each head",
    "units": "one number of a recurrent state",
    "stream": "a channel of a sum of layers, such as a residual stream",
    "neurons": "a number that linear layers make and linear layers read, and nothing else",
    "channels": "any other channel",
}


def kinds(graph: Graph, trace: Trace, found: Sequence[Layer]) -> Callable[[Axis, Sequence[str], Sequence[str]], str]:
    """A function from a group's atom, and the names of the layers that make and that read it, to its kind."""
    of = {layer.name: layer.kind for layer in found}
    roles = {role: {atom for axis in noted for atom in atoms(axis)} for role, noted in trace.roles.items()}
    several = {atom for axis in trace.roles.get("heads", ()) if len(inside := list(atoms(axis))) > 1 for atom in inside}
    roles["stream"] = {atom for axis in _summed(graph, trace, found) for atom in atoms(axis)}

    def kind(atom: Axis, producers: Sequence[str], consumers: Sequence[str]) -> str:
        mine = {role for role, noted in roles.items() if atom in noted}
        if "heads" in mine:
            return "queries" if "queries" in mine and atom in several else "heads"
        if role := next((role for role in ("width", "units", "stream") if role in mine), None):
            return role
        made, read = {of[name] for name in producers} - {"norm"}, {of[name] for name in consumers}
        return "neurons" if made == read == {"linear"} else "channels"

    return kind


def _summed(graph: Graph, trace: Trace, found: Sequence[Layer]) -> list[Axis]:
    """The axes in which results of different layers are added; a layer plus a function of itself (GELU) is no such sum."""
    weighted = {layer.node for layer in found if layer.kind != "norm"}
    origins: dict[fx.Node, frozenset[fx.Node]] = {}
    summed: list[Axis] = []
    for node in graph.fx.nodes:
        inputs = node.all_input_nodes
        origins[node] = frozenset([node]) if node in weighted else frozenset().union(*(origins[given] for given in inputs))
        if node.target in (aten.add.Tensor, aten.sub.Tensor) and len(inputs) == 2:
            a, b = inputs
            if origins[a] and origins[b] and origins[a] != origins[b]:
                summed += _common(trace.axes(a), trace.axes(b))
    return summed


def _common(a: Axes, b: Axes) -> list[Axis]:
    return [x for x, y in zip(reversed(a), reversed(b), strict=False) if x.size == y.size > 1]
