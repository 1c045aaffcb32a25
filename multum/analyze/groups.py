"""Which channels go together, in which tensors they lie, and why some cannot be cut."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..graph import Graph
from ..graph.axes import Group, Groups, axes
from ..graph.axis import Axis, find
from ..graph.axis_kinds import KINDS
from ..task import Task
from .profile import captured


def groups(model: Task | Graph | nn.Module, example: Any = None) -> dict[str, Any]:
    """The groups of channels of a model as plain data, in order of execution.

    Of each group: `name`, `kind` (explained under `kinds`), `size`, `reason` (why it cannot be cut; None when it can), `block`,
    `parameters` (how many go with one channel, at least), `producers`, `consumers`, `factors` (the groups of which each channel has
    one of its own, as a head has its width) and `members`: `tensor`, `dim`, `size` and `layout` of the dimension, in which the
    group's own part stands in brackets: of `3 x [12] x 64` it is the heads; of `[64] + 128` the first 64 of a concatenation.
    """
    graph, _ = captured(model, example)
    found = axes(graph)
    rows = [_row(graph, found, group) for group in found]
    return {"groups": rows, "kinds": {kind: text for kind, text in KINDS.items() if any(row["kind"] == kind for row in rows)}}


def _row(graph: Graph, found: Groups, group: Group) -> dict[str, Any]:
    parameters = {name for name, _ in graph.tensors.named_parameters()}
    rest = {group.name: range(group.size - 1)}
    tensors = {name: found.tensors[name] for name, _ in group.members}
    sizes = [
        (math.prod(axis.size for axis in dims), math.prod(found.size(axis, rest) for axis in dims))
        for name, dims in tensors.items()
        if name in parameters
    ]
    return {
        "name": group.name,
        "kind": group.kind,
        "size": group.size,
        "reason": group.reason,
        "block": group.block,
        "parameters": sum(before - after for before, after in sizes),
        "producers": list(group.producers),
        "consumers": list(group.consumers),
        "factors": [other.name for other in found.factors(group)],
        "members": [
            {"tensor": name, "dim": dim, "size": tensors[name][dim].size, "layout": _layout(tensors[name][dim], group.axis)}
            for name, dim in group.members
        ],
    }


def _layout(axis: Axis, own: Axis) -> str:
    """How an axis is put together, such as `3 x [12] x 64`; factors from the slowest to the fastest, parts from left to right."""
    axis = find(axis)
    if axis.parts:
        return " + ".join(_layout(part, own) for part in axis.parts)
    if axis.factors:
        return " x ".join(f"({_layout(factor, own)})" if find(factor).parts else _layout(factor, own) for factor in axis.factors)
    return f"[{axis.size}]" if axis is own else str(axis.size)
