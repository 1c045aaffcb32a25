"""Weights that a graph reads out of a table of shared numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import Graph, Layer, layers, select
from ..graph.model import aten
from ..step import Plan

_KINDS = ("conv", "linear", "embedding", "rnn")

Add = Callable[..., fx.Node]  # an operator and its arguments, put into the graph
Make = Callable[[Callable[[str], fx.Node], Add, fx.Node | None], fx.Node]  # (a tensor by name, Add, rows or all) -> values in any form


def planned(
    graph: Graph,
    include: str | Sequence[str],
    exclude: str | Sequence[str],
    reason: Callable[[Layer], str | None],
    change: Callable[[Layer], dict[str, Any]],
) -> Plan:
    """What becomes of each weight by `change`, unless there is a `reason` against it; a layer that shares one goes with the first."""
    chosen = {layer.name for layer in select(graph, include, exclude, _KINDS)}
    changes, skipped, shared = dict[str, dict[str, Any]](), dict[str, str](), dict[str, str]()
    for layer in [layer for layer in layers(graph) if layer.kind in _KINDS]:
        why = "excluded by name" if layer.name not in chosen else reason(layer)
        if why:
            skipped[layer.name] = why
        elif layer.weight in shared:
            changes[layer.name] = {"with": shared[layer.weight]}
        else:
            shared[layer.weight] = layer.name
            changes[layer.name] = change(layer)
    return Plan(changes, skipped)


def read_from(graph: Graph, weight: str, indices: Tensor, codebook: str, offset: Tensor | int, scale: Tensor | None = None) -> None:
    """The tensor `weight` becomes codebook[indices + offset], times a scale that trains, wherever the graph reads it; in place.

    `indices` are small integers [..., n], `codebook` names a parameter [entries, size], `offset` is a number or integers that broadcast
    over the indices. The gradient of an entry is the sum of those of all weights that read it (Han, Mao & Dally 2016, section 3).
    """
    graph.set_tensor(f"{weight}_indices", indices)
    if isinstance(offset, Tensor):
        graph.set_tensor(f"{weight}_offsets", offset)
    if scale is not None:
        graph.set_tensor(f"{weight}_scale", scale, parameter=True)

    def looked_up(tensor: Callable[[str], fx.Node], add: Add, row: fx.Node | None) -> fx.Node:
        index, shift = tensor(f"{weight}_indices"), tensor(f"{weight}_offsets") if isinstance(offset, Tensor) else offset
        entries = tensor(codebook)
        if row is not None:
            index = add(aten.embedding.default, index, row)
            if isinstance(offset, Tensor) and offset.shape[0] > 1:
                shift = add(aten.embedding.default, shift, row)
        index = add(aten._to_copy.default, index, dtype=torch.int32)
        if isinstance(shift, fx.Node) or shift:
            index = add(aten.add.Tensor, index, shift)
        return add(aten.index_select.default, entries, 0, add(aten.reshape.default, index, [-1]))

    replace_reads(graph, weight, looked_up, f"{weight}_scale" if scale is not None else None)


def replace_reads(graph: Graph, weight: str, make: Make, scale: str | None = None) -> None:
    """The tensor `weight` becomes what `make` puts in, reshaped, times a scale, wherever the graph reads it; in place.

    A table of embeddings is never laid out: `make` is told the rows that are looked up.
    """
    reads = [node for node in graph.fx.nodes if node.op == "get_attr" and node.target == weight]
    shape = list(graph.tensor(weight).shape)

    def made(before: fx.Node, like: fx.Node, size: list[Any], row: fx.Node | None) -> fx.Node:
        def add(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            with graph.fx.inserting_before(before):
                node = graph.fx.call_function(target, args, kwargs)
            node.meta = dict(like.meta)
            return node

        def tensor(name: str) -> fx.Node:
            return graph.attribute(name, before)

        value = add(aten.reshape.default, make(tensor, add, row), size)
        return value if scale is None else add(aten.mul.Tensor, value, tensor(scale))

    whole: fx.Node | None = None
    for node in reads:
        for user in list(node.users):
            if user.target is aten.embedding.default and user.args[0] is node:
                positions = user.args[1]
                assert isinstance(positions, fx.Node)
                with graph.fx.inserting_before(user):
                    sizes = [graph.fx.call_function(aten.sym_size.int, (positions, dim)) for dim in range(positions.meta["val"].ndim)]
                user.replace_all_uses_with(made(user, user, [*sizes, shape[1]], positions))
            else:
                whole = whole or made(reads[0], user, shape, None)
                user.replace_input_with(node, whole)
    graph.clean()
    with torch.no_grad():
        graph.refresh()
