"""Exact fusion: several layers without anything between them that is not linear become one."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import fx

from ..graph import Graph, layers, select
from ..graph.model import aten
from ..step import Plan, Stage, Step, option
from ..task import Task
from .affine import Affine, affine, macs, plain_layers

_KINDS = ("conv", "linear")


@dataclass(frozen=True)
class Merge(Step):
    """Branches that are added, and chains of layers, become one layer that computes the same (Ding et al. 2021, "RepVGG", section 3.3).

    Convolutions of one input with windows that lie over each other, the input itself, averages over windows, each with its batch norm;
    a convolution before or behind one of 1x1, and linear layers one behind the other. Only where the one costs no more: factors of low
    rank stay. Up to rounding nothing changes in eval mode; for training, normalization over several branches is no more.
    """

    stage: ClassVar[Stage | None] = Stage.STRUCTURE

    include: str | tuple[str, ...] = option("*", "layers that may be merged, as glob patterns")
    exclude: str | tuple[str, ...] = option((), "layers that may not")

    def plan(self, graph: Graph, task: Task) -> Plan:
        chosen = {layer.name for layer in select(graph, self.include, self.exclude, _KINDS)}
        found, costly = merges(graph, chosen)
        changes = {}
        for node, one in found.items():
            now, then = macs(one, node)
            changes[one.layers[0].name] = {"with": [layer.name for layer in one.layers[1:]], "macs": [now, then]}
        gone = {layer.name for one in found.values() for layer in one.layers}
        reasons = dict.fromkeys(costly, "as one layer it would cost more")
        skipped = {
            layer.name: reasons.get(layer.name, "nothing linear is beside it" if layer.name in chosen else "excluded by name")
            for layer in layers(graph)
            if layer.kind in _KINDS and layer.name not in gone
        }
        return Plan(changes, skipped)

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        named = {name for first, change in plan.changes.items() for name in (first, *change["with"])}
        merge(graph, named)
        return {}


def merges(graph: Graph, chosen: Container[str]) -> tuple[dict[fx.Node, Affine], set[str]]:
    """What can be one layer, by its last operator, and the names of layers for which one would cost more."""
    known = {node: layer for node, layer in plain_layers(graph).items() if layer.name in chosen}
    found, inside, costly = dict[fx.Node, Affine](), set[str](), set[str]()
    for node in reversed(graph.fx.nodes):
        one = affine(graph, node, known) if node.op == "call_function" else None
        if one is None or not one.layers or len(one.layers) + one.sums < 2 or inside & {layer.name for layer in one.layers}:
            continue
        now, then = macs(one, node)
        if then > now:
            costly |= {layer.name for layer in one.layers}
            continue
        inside |= {layer.name for layer in one.layers}
        found[node] = one
    return found, costly - inside


def merge(graph: Graph, chosen: Container[str]) -> None:
    """Merges what these layers have to do with, in place."""
    for node, one in merges(graph, chosen)[0].items():
        old = graph.tensor(one.layers[0].weight)
        base = one.layers[0].weight.removesuffix(".weight")
        tensors = {"weight": one.weight, "bias": one.bias}
        given = []
        for part, value in tensors.items():
            name = f"{base}.merged.{part}"
            graph.set_tensor(name, value.to(old.dtype).contiguous(), parameter=True)
            given.append(graph.attribute(name, node))
        if one.weight.ndim == 2:
            made = graph.operator(aten.linear.default, (one.source, *given), node, node)
        else:
            rest = [list(one.stride), list(one.padding), list(one.dilation), one.groups]
            made = graph.operator(getattr(aten, f"conv{one.weight.ndim - 2}d").default, (one.source, *given, *rest), node, node)
        made.meta["module"] = one.layers[0].node.meta.get("module", "")
        node.replace_all_uses_with(made)
    graph.clean()
    with torch.no_grad():
        graph.refresh()
