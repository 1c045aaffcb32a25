"""Layers that share one tensor."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..errors import StepError
from ..graph import Graph, Layer, layers, select
from ..graph.matrix import data, from_matrix, to_matrix
from ..graph.model import aten
from ..step import Plan, Stage, Step, option
from ..task import Task

_ORDERS, _STARTS = ("groups", "cycle", "similar"), ("first", "last", "mean")


@dataclass(frozen=True)
class Ties(Step):
    """Layers of equal shape that stand in a row, such as those of a transformer's blocks, share one weight (Lan et al. 2020, section 3.1).

    A row are layers whose names differ in numbers alone. Of each row `count` tensors are left: with the order "groups" neighbours
    share one, with "cycle" every count-th layer does (Takase & Kiyono 2021, section 2), with "similar" those that it changes
    least. With `scales` each layer multiplies its outputs by numbers of its own, at first those of least squares. With a `rank` each
    linear layer adds a product of two thin matrices of its own, at first the best approximation of what sharing took from it (Bae et al.
    2024, "Relaxed recursive transformers", section 2.4). Nothing is as before until training has followed, best toward the original
    (`distill.Logits`).
    """

    stage: ClassVar[Stage | None] = Stage.STRUCTURE

    count: int = option(1, "tensors that are left of each row of layers")
    order: str = option("groups", "which layers share: groups of neighbours, every count-th in a cycle, or similar ones")
    start: str = option("first", "what a shared tensor is at first: that of the first or last layer that shares it, or their mean")
    scales: bool = option(False, "each layer scales its outputs by itself")
    rank: int = option(0, "of a difference that each linear layer keeps for itself; 0: none")
    own: bool = option(True, "biases and normalizations stay each layer's own")
    groups: str | tuple[str, ...] = option((), "glob patterns: the layers of each are one row; without any, rows are found by names")
    include: str | tuple[str, ...] = option("*", "layers that may be tied, as glob patterns")
    exclude: str | tuple[str, ...] = option((), "layers that may not")

    def __post_init__(self) -> None:
        for name, known in (("order", _ORDERS), ("start", _STARTS)):
            if getattr(self, name) not in known:
                raise StepError(f"share.Ties: {name} is {getattr(self, name)!r}.", f"one of {', '.join(known)}")
        if self.count < 1 or self.rank < 0:
            raise StepError(f"share.Ties: count is {self.count}, rank {self.rank}.", "a count of at least 1 and a rank of at least 0")

    def plan(self, graph: Graph, task: Task) -> Plan:
        uses = Counter(layer.weight for layer in layers(graph))
        rows, skipped = dict[Any, list[Layer]](), dict[str, str]()
        for layer in select(graph, self.include, self.exclude, ("conv", "linear", *(() if self.own else ("norm",)))):
            weight = graph.tensor(layer.weight)
            if uses[layer.weight] > 1 or layer.quantizer() is not None or layer.weight in graph.sparse:
                skipped[layer.name] = "its weight is shared already, quantized or sparse"
            elif not self.groups:
                rows.setdefault((re.sub(r"\d+", "#", layer.name), layer.node.target, layer.axis, tuple(weight.shape)), []).append(layer)
        for pattern in (self.groups,) if isinstance(self.groups, str) else self.groups:
            rows[pattern] = [layer for layer in select(graph, pattern, (), ("conv", "linear", "norm")) if layer.name not in skipped]
            shapes = {tuple(graph.tensor(layer.weight).shape): layer.name for layer in rows[pattern]}
            if len(shapes) > 1:
                told = ", ".join(f"{name} {list(shape)}" for shape, name in shapes.items())
                raise StepError(f"share.Ties: {pattern!r} has layers of unequal shape: {told}.", "layers of one shape in each group")
        changes = dict[str, dict[str, Any]]()
        for row in rows.values():
            slots = self._slots([graph.tensor(layer.weight).detach() for layer in row])
            for layer, slot in zip(row, slots, strict=True):
                mates = [mate for mate, other in zip(row, slots, strict=True) if other == slot]
                if len(mates) > 1:
                    changes[layer.name] = {"with": mates[0].name, "of": len(mates)}
                else:
                    skipped[layer.name] = "there is no other in its row to share with"
        return Plan(changes, skipped)

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        groups: dict[str, list[Layer]] = {}
        for layer in layers(graph):
            if layer.name in plan.changes:
                groups.setdefault(plan.changes[layer.name]["with"], []).append(layer)
        for members in groups.values():
            weights = [graph.tensor(layer.weight).detach() for layer in members]
            shared = self._shared(weights)
            for layer, weight in zip(members, weights, strict=True):
                left, result = weight - shared, layer.node
                if self.scales and layer.kind != "norm" and layer.node.target is not aten.addmm.default:
                    own = _scales(layer, weight, shared)
                    left = weight - from_matrix(layer, own[:, :, None] * to_matrix(layer, shared), shared.shape)
                    result = _add_scales(graph, layer, own.flatten())
                if self.rank and layer.kind == "linear":
                    _add_difference(graph, layer, to_matrix(layer, left)[0], self.rank, result)
            _tie(graph, [layer.weight for layer in members], shared)
            biases = [layer.bias for layer in members if layer.bias]
            if not self.own and len(set(biases)) == len(members):
                _tie(graph, biases, self._shared([graph.tensor(name).detach() for name in biases]))
        graph.clean()
        return {}

    def _slots(self, weights: Sequence[Tensor]) -> list[int]:
        """Which of the tensors that are left each layer of a row gets."""
        size = len(weights)
        if self.order == "similar":
            return similar(torch.stack([weight.flatten() for weight in weights]), self.count) if weights else []
        return [place % self.count if self.order == "cycle" else place * self.count // size for place in range(size)]

    def _shared(self, values: Sequence[Tensor]) -> Tensor:
        if self.start == "mean":
            return torch.stack(list(values)).mean(0)
        return values[0 if self.start == "first" else -1].clone()


def similar(rows: Tensor, count: int) -> list[int]:
    """A number for each row [n, width], the same for those of one cluster.

    At first each is its own, then the two join by which the squared distances from the means grow least (Ward 1963).
    """
    owner = list(range(len(rows)))
    while len(set(owner)) > count:
        clusters = {slot: rows[[place for place, other in enumerate(owner) if other == slot]] for slot in dict.fromkeys(owner)}
        costs = {
            (a, b): len(x) * len(y) / (len(x) + len(y)) * float((x.mean(0) - y.mean(0)).square().sum())
            for a, x in clusters.items()
            for b, y in clusters.items()
            if a < b
        }
        one, other = min(costs, key=costs.__getitem__)
        owner = [one if slot == other else slot for slot in owner]
    return owner


def _scales(layer: Layer, weight: Tensor, shared: Tensor) -> Tensor:
    """By what each output of the shared weight comes nearest to that of the layer's own [groups, outputs of a group]."""
    own, other = to_matrix(layer, weight), to_matrix(layer, shared)
    found: Tensor = (own * other).sum(2) / other.square().sum(2).clamp_min(1e-30)
    return found


def _add_scales(graph: Graph, layer: Layer, scales: Tensor) -> fx.Node:
    """The layer's outputs are multiplied before its bias is added; gives what comes of it."""
    name, after, node = f"{layer.name.replace(':', '_')}.own_scale", layer.node.next, layer.node
    form = scales if layer.kind == "linear" else scales.reshape(-1, *[1] * (node.meta["val"].ndim - 2))
    graph.set_tensor(name, form.clone(), parameter=True)
    bias, users = node.args[layer.position + 1] if layer.bias else None, list(node.users)
    value = graph.operator(aten.mul.Tensor, (node, graph.attribute(name, after)), node, after)
    if isinstance(bias, fx.Node):
        node.update_arg(layer.position + 1, None)
        if layer.kind == "conv":
            bias = graph.operator(aten.reshape.default, (bias, [-1, *form.shape[1:]]), bias, after)
            bias.meta["val"] = form.to("meta")
        value = graph.operator(aten.add.Tensor, (value, bias), node, after)
    for user in users:
        user.replace_input_with(node, value)
    return value


def _tie(graph: Graph, names: Sequence[str], value: Tensor) -> None:
    """All reads of these tensors become reads of the first, which gets the value."""
    graph.set_tensor(names[0], value)
    for node in graph.fx.nodes:
        if node.op == "get_attr" and node.target in names:
            node.target = names[0]


def _add_difference(graph: Graph, layer: Layer, difference: Tensor, rank: int, result: fx.Node) -> None:
    """The layer's result, as it leaves, gets B A x added, B A the best approximation of this rank of a matrix [outputs, inputs]."""
    left, values, right = torch.linalg.svd(difference.double(), full_matrices=False)
    root = values[:rank].sqrt()
    factors = (root[:, None] * right[:rank], left[:, :rank] * root)
    base, value, after = layer.name.replace(":", "_"), data(layer), result.next
    for place, factor in enumerate(factors):
        name = f"{base}.own{place}.weight"
        graph.set_tensor(name, factor.to(difference.dtype).contiguous(), parameter=True)
        weight = graph.attribute(name, after)
        with graph.fx.inserting_before(after):
            value = graph.fx.call_function(aten.linear.default, (value, weight))
        value.meta = dict(layer.node.meta)
    users: list[fx.Node] = list(result.users)
    with graph.fx.inserting_before(after):
        total = graph.fx.call_function(aten.add.Tensor, (result, value))
    total.meta = dict(layer.node.meta)
    for user in users:
        user.replace_input_with(result, total)
    with torch.no_grad():
        graph.recompile()
        graph.refresh()
