"""Residual blocks: branches beside which their own input is added, found in the operators, whatever modules they were written in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from .layers import Layer, layers
from .model import Graph, aten

_SUMS = (aten.add.Tensor, aten.add_.Tensor)


@dataclass(frozen=True, eq=False)
class Block:
    """A branch: `total` = `skip` + branch(`skip`). Without it `skip` takes the place of `total`.

    Where nobody but a normalization reads the sum, `norm` is its result, in whose place `skip` may be put as well. `name` is that of
    the last layer of the branch that has weights, `layers` are all that only it needs, norms among them.
    """

    name: str
    total: fx.Node
    skip: fx.Node
    norm: fx.Node | None
    layers: tuple[str, ...]


def blocks(graph: Graph) -> list[Block]:
    """The blocks in order of execution; one may lie inside another."""
    known, before = {layer.node: layer for layer in layers(graph)}, _ancestors(graph)
    found, names = list[Block](), dict[str, int]()
    for total, skip, branch in _sums(graph, before):
        inside = [known[node] for node in _only_for(graph, branch, total) if node in known]
        weighted = [layer for layer in inside if layer.kind != "norm"]
        if not weighted:
            continue  # such as a GELU written out: x + 0.04 x^3
        name = weighted[-1].name
        names[name] = names.get(name, 0) + 1
        name = name if names[name] == 1 else f"{name}:{names[name]}"
        found.append(Block(name, total, skip, _norm_after(total, known), tuple(layer.name for layer in inside)))
    return found


def skip(graph: Graph, ends: Iterable[tuple[Block, fx.Node]]) -> None:
    """Takes blocks of the graph out of it, each up to an end: its `total` or its `norm`; in place."""
    instead: dict[fx.Node, fx.Node] = {}
    for block, end in ends:
        source = block.skip
        while source in instead:
            source = instead[source]
        end.replace_all_uses_with(source)
        instead[end] = source
    graph.clean()


def _sums(graph: Graph, before: dict[fx.Node, int]) -> Iterator[tuple[fx.Node, fx.Node, fx.Node]]:
    places = {node: place for place, node in enumerate(graph.fx.nodes)}
    for node in graph.find(*_SUMS):
        if len(node.all_input_nodes) == 2 and not node.kwargs:
            for one, other in (node.all_input_nodes, reversed(node.all_input_nodes)):
                if before[other] >> places[one] & 1 and _alike(one, node):
                    yield node, one, other


def _ancestors(graph: Graph) -> dict[fx.Node, int]:
    """For each node the bits of the places of all nodes that it depends on."""
    found: dict[fx.Node, int] = {}
    places = {node: place for place, node in enumerate(graph.fx.nodes)}
    for node in graph.fx.nodes:
        bits = 0
        for given in node.all_input_nodes:
            bits |= found[given] | 1 << places[given]
        found[node] = bits
    return found


def _only_for(graph: Graph, branch: fx.Node, total: fx.Node) -> list[fx.Node]:
    """The nodes that nobody needs when `total` no longer reads `branch`, in order of execution."""
    dead: dict[fx.Node, None] = {}
    for node in reversed(graph.fx.nodes):
        users = set(node.users) - ({total} if node is branch else set())
        if (users or node is branch) and users <= dead.keys():
            dead[node] = None
    return list(reversed(dead))


def _norm_after(total: fx.Node, known: dict[fx.Node, Layer]) -> fx.Node | None:
    if len(total.users) != 1:
        return None
    (user,) = total.users
    return user if user in known and known[user].kind == "norm" and _alike(user, total) else None


def _alike(a: fx.Node, b: fx.Node) -> bool:
    one, other = a.meta.get("val"), b.meta.get("val")
    return isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape and one.dtype == other.dtype
