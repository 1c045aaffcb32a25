"""Cuts channels out of a graph for good: out of parameters, buffers and the sizes written into its operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import GraphError
from .axes import Groups, Keep, axes
from .axis_trace import Kept
from .model import Graph


def cut(graph: Graph, keep: Keep) -> None:
    """Keeps of each group named in `keep` these indices, in increasing order, and all of every other group; in place.

    The result computes what the graph computes when the other channels are zero wherever they are read. Raises
    GraphError for an unknown group, one that cannot be cut, and indices that are empty, unordered or out of range.
    """
    groups = axes(graph)
    check(groups, keep)
    for name, dims in groups.tensors.items():
        value = graph.tensor(name)
        gradient = value.grad
        changed = False
        for dim, axis in enumerate(dims):
            if groups.size(axis, keep) == axis.size:
                continue
            index = groups.mask(axis, keep).nonzero().flatten().to(value.device)
            value, gradient = _take(value, dim, index), None if gradient is None else _take(gradient, dim, index)
            changed = True
        if changed:
            graph.set_tensor(name, value)
            graph.tensor(name).grad = gradient
    for node, dims in groups.results.items():  # what `Graph.refresh` would find, which takes ten times as long as all else
        node.meta["val"] = _resized(node.meta["val"], dims, lambda axis: groups.size(axis, keep))
    for edit in groups.edits:
        edit(lambda axis: groups.size(axis, keep))
    graph.clean()


def check(groups: Groups, keep: Keep) -> None:
    """Raises GraphError when `keep` cannot be carried out."""
    for name, indices in keep.items():
        group = groups[name]
        if group.reason:
            raise GraphError(f"The group of channels {name!r} cannot be cut: {group.reason}.")
        chosen = list(indices)
        if not chosen or chosen != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= group.size:
            raise GraphError(f"The indices to keep of {name!r} are {chosen[:8]}.", f"some of 0..{group.size - 1}, increasing")


def _resized(value: Any, dims: Any, kept: Kept) -> Any:
    """The same result of an operator, with the sizes that its axes have now."""
    if not isinstance(value, Tensor):
        return tuple(_resized(part, own, kept) for part, own in zip(value, dims, strict=True))
    return value.new_empty([kept(axis) for axis in dims])


def _take(value: Tensor, dim: int, index: Tensor) -> Tensor:
    with torch.no_grad():
        return value.detach().index_select(dim, index)
