"""Graphs put into graphs, and cut into parts that run one after the other."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from .model import Graph

_TENSOR: dict[str, Any] = {"t": "tensor"}


def graft(graph: Graph, at: fx.Node, other: Graph, prefix: str) -> fx.Node:
    """Puts the operators of a graph with one input and one output behind `at`, which it reads; its tensors lie under `prefix`.

    Returns the node of the result, which nobody reads yet; in place.
    """
    made: dict[fx.Node, fx.Node] = {}
    for name, value in other.named_tensors():
        graph.set_tensor(f"{prefix}.{name}", value, parameter=isinstance(value, torch.nn.Parameter))
    last, results = at, tuple[Any, ...]()
    for node in other.fx.nodes:
        if node.op == "placeholder":
            made[node] = at
        elif node.op == "output":
            results = tuple(node.args[0])
        else:
            with graph.fx.inserting_after(last):
                one = graph.fx.node_copy(node, made.__getitem__)
            if node.op == "get_attr":
                one.target = f"{prefix}.{node.target}"
            last = made[node] = one
    graph.recompile()
    return made[results[0]]


def split(graph: Graph, ends: Sequence[fx.Node], extra: Sequence[Sequence[fx.Node]]) -> list[Graph]:
    """The graph as parts of which each but the last stops behind one of `ends`, which are in order of execution.

    A part gives a tuple: the `extra` results asked of it, each in the structure of the graph's outputs, of which there is one, then what
    the next part takes, by position. The last part gives what the graph gives.
    """
    nodes = list(graph.fx.nodes)
    places = {node: place for place, node in enumerate(nodes)}
    bounds = [0, *(places[end] + 1 for end in ends), len(nodes)]
    carried = [_crossing(nodes, bound) for bound in bounds[1:-1]]
    parts = []
    for part, (first, last) in enumerate(pairwise(bounds)):
        final = part == len(ends)
        results = [] if final else [*extra[part], *carried[part]]
        operators = _part(nodes[first:last], carried[part - 1] if part else [], results, set(nodes[:first]))
        taken = {"t": "tuple", "c": [_TENSOR] * len(carried[part - 1])} if part else {}
        inputs = {"t": "tuple", "c": [taken, {"t": "dict", "k": [], "c": []}]} if part else graph.inputs
        given = [*([graph.outputs] * len(extra[part])), *([_TENSOR] * len(carried[part]))] if not final else []
        outputs = graph.outputs if final else {"t": "tuple", "c": given}
        one = Graph(operators, copy.deepcopy(graph.tensors), inputs, outputs)
        one.pinned = graph.pinned
        one.clean()
        one.refresh()
        parts.append(one.eval())
    return parts


def _crossing(nodes: Sequence[fx.Node], bound: int) -> list[fx.Node]:
    """The tensors computed before `bound` that are read behind it, in order; sizes are computed anew from the tensors they come from."""
    before, found = set(nodes[:bound]), set[fx.Node]()

    def need(node: fx.Node) -> None:
        if node in before and node.op != "get_attr" and node not in found:
            if isinstance(node.meta.get("val"), Tensor):
                found.add(node)
            else:
                for given in node.all_input_nodes:
                    need(given)

    for node in nodes[bound:]:
        for given in node.all_input_nodes:
            need(given)
    return [node for node in nodes[:bound] if node in found]


def _part(own: Sequence[fx.Node], taken: Sequence[fx.Node], results: Sequence[fx.Node], before: set[fx.Node]) -> fx.Graph:
    operators, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for place, node in enumerate(taken):
        made[node] = operators.placeholder(f"carried_{place}")
        made[node].meta = dict(node.meta)

    def bring(node: fx.Node) -> None:
        """What was there before and is no tensor that was taken: a weight, a size."""
        if node not in made and node in before:
            for given in node.all_input_nodes:
                bring(given)
            made[node] = operators.node_copy(node, made.__getitem__)

    for node in own:
        for given in node.all_input_nodes:
            bring(given)
        if node.op != "output":
            made[node] = operators.node_copy(node, made.__getitem__)
        elif not results:
            operators.output(fx.map_arg(node.args[0], made.__getitem__))
    if results:
        for node in results:
            bring(node)
        operators.output(tuple(made[node] for node in results))
    return operators
