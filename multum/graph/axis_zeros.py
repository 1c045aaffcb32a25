"""Whether a channel that no layer fills is zero where it is read, and not shifted on the way, as by a mean that was taken off all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from .axis import Axis, atoms
from .axis_trace import Trace, is_pointwise, name_of
from .layers import source

# Functions of one number that give zero for zero.
_THROUGH_ZERO = ("square", "abs", "neg", "relu", "silu", "gelu", "tanh", "elu", "leaky_relu", "to", "_to_copy", "contiguous", "dropout")


def keeps_zeros(trace: Trace, node: Any, channels: Iterable[Axis]) -> bool:
    """Whether channels that are cut would be zero in the result of a node, had they only been set to zero in the parameters."""
    wanted = {atom for axis in channels for atom in atoms(axis) if atom.size > 1}
    if not wanted or node.op != "call_function":
        return True
    known = trace.zeros.get(node)
    if known is None or {atom for axis in known[0] for atom in atoms(axis)} != wanted:
        known = trace.zeros[node] = (wanted, _arrives_as_zero(trace, node, wanted))
    return known[1]


def _arrives_as_zero(trace: Trace, node: fx.Node, wanted: set[Axis]) -> bool:
    held = {operand: wanted & set(_atoms(trace.results.get(operand, ()))) for operand in node.all_input_nodes}
    if not is_pointwise(node.target) and not (hasattr(node.target, "overloadpacket") and name_of(node) in _THROUGH_ZERO):
        of_layer = any(source(operand) for operand in node.all_input_nodes)
        return of_layer or all(keeps_zeros(trace, operand, part) for operand, part in held.items())
    if (name := name_of(node)) == "mul":
        return any(part == wanted and keeps_zeros(trace, operand, part) for operand, part in held.items())
    if name in ("add", "sub"):
        return len(node.args) == sum(isinstance(argument, fx.Node) for argument in node.args) and all(
            part == wanted and keeps_zeros(trace, operand, part) for operand, part in held.items()
        )
    first = node.args[0]
    if not isinstance(first, fx.Node) or held[first] != wanted:
        return False
    power = node.args[1] if name == "pow" else 1
    return (name in ("pow", "div", *_THROUGH_ZERO)) and isinstance(power, int | float) and power > 0 and keeps_zeros(trace, first, wanted)


def _atoms(axes: Any) -> Iterable[Axis]:
    for part in axes:
        yield from atoms(part) if isinstance(part, Axis) else _atoms(part)
