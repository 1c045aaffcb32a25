"""What the rules of operators share: the state of a trace through the graph, the table of rules, and what is done without one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .axis import Axis, fix, unify
from .model import aten, read, write

Axes = tuple[Axis, ...]
Kept = Callable[[Axis], int]  # the new size of an axis
Edit = Callable[[Kept], None]  # writes new sizes where an operator has the old ones as literals
Rule = Callable[["Trace", fx.Node], Any]  # gives the axes of the result: `Axes`, or a tuple of them

RULES: dict[Any, Rule] = {}


class Trace:
    """The axes of every tensor and every result of a graph, as far as the rules have come, their roles, and the edits of literals."""

    def __init__(self) -> None:
        self.results: dict[fx.Node, Any] = {}
        self.tensors: dict[str, Axes] = {}
        self.edits: list[Edit] = []
        self.roles: dict[str, list[Axis]] = {}
        self.zeros: dict[fx.Node, tuple[set[Axis], bool]] = {}  # of these channels of a result: see `keeps_zeros`

    def note(self, role: str, axes: Iterable[Axis]) -> None:
        """What the axes are for: the `kind` of the groups that they turn out to hold."""
        self.roles.setdefault(role, []).extend(axes)

    def axes(self, value: Any) -> Axes:
        """The axes of an argument; none for a scalar."""
        found = self.results.get(value, ()) if isinstance(value, fx.Node) else ()
        return found if all(isinstance(axis, Axis) for axis in found) else ()

    def argument(self, node: fx.Node, name: str) -> Axes:
        return self.axes(read(node, name))

    def literal(self, node: fx.Node, name: str, value: Callable[[Kept], Any]) -> None:
        """After a cut, the argument `name` of the node becomes `value`."""
        self.edits.append(lambda kept: assign(node, name, value(kept)))

    def scaled(self, node: fx.Node, factor: Callable[[Kept], float]) -> None:
        """After a cut, whoever reads the result of the node gets it times `factor`."""
        self.edits.append(lambda kept: _multiply(node, factor(kept)))


def assign(node: fx.Node, name: str, value: Any) -> None:
    """Sets an argument of an ATen call by its name."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    write(node, names.index(name), name, value)


def _multiply(node: fx.Node, factor: float) -> None:
    if factor == 1:
        return
    user = next(iter(node.users))
    if len(node.users) == 1 and user.target is aten.mul.Tensor and isinstance(user.args[1], float):  # a cut before this one
        user.update_arg(1, user.args[1] * factor)
        return
    with node.graph.inserting_after(node):
        made = node.graph.call_function(aten.mul.Tensor, (node, factor))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made, lambda user: user is not made)


def rule(*operators: Any) -> Callable[[Rule], Rule]:
    """The rule of these operators, or of all overloads of these packets."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, function))
        return function

    return register


def shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def fixed(sizes: Iterable[int], reason: str) -> Axes:
    return tuple(Axis(size, reason) for size in sizes)


def fix_all(axes: Iterable[Axis], reason: str) -> None:
    for axis in axes:
        fix(axis, reason)


def broadcast(operands: Sequence[Axes]) -> Axes:
    """The axes of operands that are aligned on the right; an axis of size one links to nothing."""
    result = []
    for place in range(max(map(len, operands), default=0), 0, -1):
        meeting = [axes[-place] for axes in operands if len(axes) >= place]
        wide = [axis for axis in meeting if axis.size != 1] or meeting
        for axis in wide[1:]:
            unify(wide[0], axis)
        result.append(wide[0])
    return tuple(result)


def unknown(trace: Trace, node: fx.Node) -> Any:
    """Nothing is known about the operator: whatever it touches stays whole."""
    reason = f"the operator {node.target} has no rule"
    for given in node.all_input_nodes:
        found = trace.results.get(given, ())
        for axes in (found,) if trace.axes(given) else found:
            fix_all(axes if isinstance(axes, tuple) else (), reason)
    value = node.meta.get("val")
    results = tuple(fixed(part.shape, reason) for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, Tensor))
    return results if isinstance(value, tuple) else results[0] if results else ()


def is_pointwise(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def name_of(node: fx.Node) -> str:
    return str(node.target.overloadpacket.__name__)  # type: ignore[union-attr]
