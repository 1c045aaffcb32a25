"""Weights that a graph reads out of a codebook."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..graph import Graph
from ..graph.model import aten


def read_from(graph: Graph, weight: str, indices: Tensor, codebook: str, offset: Tensor | int, scale: Tensor | None = None) -> None:
    """The tensor `weight` becomes codebook[indices + offset], times a scale that trains, wherever the graph reads it; in place.

    `indices` are small integers [..., n], `codebook` names a parameter [entries, size], `offset` is a number or integers that broadcast
    over the indices. The gradient of an entry is the sum of those of all weights that read it (Han, Mao & Dally 2016, section 3).
    A table of embeddings is never laid out: its indices are looked up first.
    """
    reads = [node for node in graph.fx.nodes if node.op == "get_attr" and node.target == weight]
    shape = list(graph.tensor(weight).shape)
    graph.set_tensor(f"{weight}_indices", indices)
    names = {"indices": f"{weight}_indices", "codebook": codebook}
    if isinstance(offset, Tensor):
        graph.set_tensor(f"{weight}_offsets", offset)
        names["offset"] = f"{weight}_offsets"
    if scale is not None:
        graph.set_tensor(f"{weight}_scale", scale, parameter=True)
        names["scale"] = f"{weight}_scale"

    def looked_up(before: fx.Node, like: fx.Node, size: list[Any], row: fx.Node | None) -> fx.Node:
        """The codebook's entries of these rows of indices, of all when there is none, in the form `size`."""
        tensors = {part: graph.attribute(name, before) for part, name in names.items()}
        with graph.fx.inserting_before(before):

            def add(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
                node = graph.fx.call_function(target, args, kwargs)
                node.meta = dict(like.meta)
                return node

            index = tensors["indices"]
            shift: Any = tensors.get("offset", offset)
            if row is not None:
                index = add(aten.embedding.default, index, row)
                if isinstance(offset, Tensor) and offset.shape[0] > 1:
                    shift = add(aten.embedding.default, shift, row)
            index = add(aten._to_copy.default, index, dtype=torch.int32)
            if isinstance(shift, fx.Node) or shift:
                index = add(aten.add.Tensor, index, shift)
            value = add(aten.index_select.default, tensors["codebook"], 0, add(aten.reshape.default, index, [-1]))
            value = add(aten.reshape.default, value, size)
            return add(aten.mul.Tensor, value, tensors["scale"]) if scale is not None else value

    whole: fx.Node | None = None
    for node in reads:
        for user in list(node.users):
            if user.target is aten.embedding.default and user.args[0] is node:
                positions = user.args[1]
                assert isinstance(positions, fx.Node)
                with graph.fx.inserting_before(user):
                    sizes = [graph.fx.call_function(aten.sym_size.int, (positions, dim)) for dim in range(positions.meta["val"].ndim)]
                user.replace_all_uses_with(looked_up(user, user, [*sizes, shape[1]], positions))
            else:
                whole = whole or looked_up(reads[0], user, shape, None)
                user.replace_input_with(node, whole)
    graph.clean()
    with torch.no_grad():
        graph.refresh()
