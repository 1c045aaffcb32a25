"""Weights that share random buckets: which one each reads is computed, not stored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..errors import StepError
from ..graph import Graph, Layer, layers
from ..graph.model import aten
from ..step import Plan, Stage, Step, option
from ..task import Task
from .codebook import Add, planned, replace_reads

_PRIME = 2**31 - 1  # products of two numbers below it are exact in 64 bits

Rule = tuple[int, int, int]


@dataclass(frozen=True)
class Hashing(Step):
    """Each weight reads one of fewer numbers, the bucket and the sign that a hash of its place says (Chen et al. 2015, section 4.3).

    The hash is a polynomial modulo a prime, from any three places independent, in exact integers; its operators stand in the graph, so that
    files and exports hold buckets alone. A bucket begins as the mean of its weights, signs undone, which is the nearest that it can come.
    Little is as before until training has followed, best toward the original (`distill.Logits`).
    """

    stage: ClassVar[Stage | None] = Stage.NUMBERS

    ratio: float = option(0.25, "buckets for each weight of a layer, more than 0 and less than 1")
    seed: int = option(0, "of the hash")
    include: str | tuple[str, ...] = option("*", "glob patterns of layers")
    exclude: str | tuple[str, ...] = option((), "glob patterns of layers to leave as they are")

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise StepError(f"share.Hashing: ratio is {self.ratio}.", "more than 0 and less than 1, such as 0.25")

    def plan(self, graph: Graph, task: Task) -> Plan:
        def change(layer: Layer) -> dict[str, Any]:
            count = graph.tensor(layer.weight).numel()
            return {"buckets": max(1, round(self.ratio * count)), "weights": count}

        return planned(graph, self.include, self.exclude, lambda layer: self._reason(graph, layer), change)

    def _reason(self, graph: Graph, layer: Layer) -> str | None:
        weight = graph.tensor(layer.weight)
        if layer.quantizer() is not None:
            return "its weight is quantized"
        if layer.weight in graph.sparse:
            return "its zeros would be filled"
        if not weight.is_floating_point() or weight.ndim < 2 or weight.numel() >= _PRIME:
            return "its weight is no matrix of floating-point numbers"
        return None

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        lost = total = 0.0
        for layer in [layer for layer in layers(graph) if "buckets" in plan.changes.get(layer.name, ())]:
            weight, count = graph.tensor(layer.weight).detach(), plan.changes[layer.name]["buckets"]
            rule = rule_of(self.seed, layer.weight)
            places = hashed(torch.arange(weight.numel(), device=weight.device), rule, count)
            buckets = _means(weight.flatten(), places, count)
            lost += float((torch.cat([buckets, -buckets])[places] - weight.flatten()).square().sum())
            total += float(weight.square().sum())
            name = f"{layer.weight}_buckets"
            graph.set_tensor(name, buckets, parameter=True)
            replace_reads(graph, layer.weight, _reading(name, tuple(weight.shape), rule, count))
        return {"lost": lost / max(total, 1e-30)}


def rule_of(seed: int, name: str) -> Rule:
    """The coefficients of the hash of a tensor: the same on every machine."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    a, b, c = (int.from_bytes(digest[place : place + 8], "little") for place in (0, 8, 16))
    return a % (_PRIME - 1) + 1, b % _PRIME, c % _PRIME


def hashed(places: Tensor, rule: Rule, count: int) -> Tensor:
    """For places (integers) the bucket that each reads; from `count` on with the other sign: bucket - `count`."""
    a, b, c = rule
    return ((a * places + b) % _PRIME * places + c) % _PRIME % (2 * count)


def _means(weight: Tensor, places: Tensor, count: int) -> Tensor:
    """The mean of each bucket's weights [count], signs undone: the least squared error."""
    signed = torch.where(places < count, weight, -weight)
    total, number = (weight.new_zeros(count).index_add_(0, places % count, value) for value in (signed, torch.ones_like(weight)))
    return total / number.clamp_min(1)


def _reading(
    buckets: str, shape: tuple[int, ...], rule: Rule, count: int
) -> Callable[[Callable[[str], fx.Node], Add, fx.Node | None], fx.Node]:
    """`hashed` in operators of the graph, over all places of the weight or those of the rows that are looked up."""

    def read(tensor: Callable[[str], fx.Node], add: Add, row: fx.Node | None) -> fx.Node:
        entries, size = tensor(buckets), torch.Size(shape).numel() if row is None else shape[1]
        device = {"dtype": torch.int64, "device": torch.device("cpu"), "pin_memory": False}
        place = add(aten.arange.default, size, **device)
        if row is not None:
            place = add(
                aten.reshape.default, add(aten.add.Tensor, add(aten.unsqueeze.default, add(aten.mul.Tensor, row, size), -1), place), [-1]
            )
        a, b, c = rule
        value = add(aten.remainder.Scalar, add(aten.add.Tensor, add(aten.mul.Tensor, place, a), b), _PRIME)
        value = add(aten.remainder.Scalar, add(aten.add.Tensor, add(aten.mul.Tensor, value, place), c), _PRIME)
        value = add(aten.remainder.Scalar, value, 2 * count)
        both = add(aten.cat.default, [entries, add(aten.neg.default, entries)])
        return add(aten.index_select.default, both, 0, value)

    return read
