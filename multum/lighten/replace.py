"""Dense layers replaced by blocks of the same form that compute less."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ..analyze.evidence import Evidence
from ..errors import StepError, near
from ..graph import Graph, Layer, layers, select
from ..graph.fuse import give_bias
from ..graph.matrix import channel_dim, data, irreplaceable, to_matrix
from ..graph.model import shape
from ..prune.recover import replaced
from ..step import Plan, Stage, Step, option
from ..task import Task
from .blocks import block_macs, dense_macs, form, put, shape_of
from .fits import FITS, Dense, Part, lost
from .recovery import recover_blocks

_LINEAR = ("grouped", "shuffled", "low_rank")  # the blocks that a linear layer can become
_WINDOWS = ("separable", "inverted", "ghost", "bottleneck", "smaller", "dilated")  # those that need a window
_FEW = 4  # outputs for each depthwise filter, or more taps: such as the first layer of a network
_ROUNDS = 60  # of halving the price of a multiply-accumulate


@dataclass(frozen=True)
class Replace(Step):
    """Convolutions and linear layers become cheaper blocks, begun at what comes nearest to their outputs and then trained one by one.

    Convolutions: depthwise separable, inverted bottleneck, bottleneck, grouped, grouped with a shuffle, ghost, smaller or dilated windows,
    low rank. Linear layers: block-diagonal (grouped), Monarch (shuffled), low rank. The weights solve least squares on second moments of
    calibration data, about the means, which biases take up; with `recover` of what the blocks before make by now. With `epochs` the blocks
    are then trained toward the hidden values of what was there before, from the first one on (as Romero et al. 2015), all together at the
    end; `distill.Logits` may follow. With a budget the blocks are chosen among `by` at one price for all layers, and layers that lose most
    for what they save stay as they are.
    """

    stage: ClassVar[Stage | None] = Stage.STRUCTURE
    needs: ClassVar[tuple[str, ...]] = ("calibration",)

    by: str | tuple[str, ...] = option(("separable", "grouped"), f"blocks, the first that fits a layer and costs less: {', '.join(FITS)}")
    macs: float | None = option(None, "share of the layers' multiply-accumulates to keep, over all at once: the blocks that lose least")
    groups: int = option(4, "of grouped and shuffled layers")
    expansion: int = option(1, "filters for each input channel of separable and inverted blocks")
    ratio: float = option(0.5, "share of the channels inside bottleneck and low_rank")
    kernel: int = option(3, "taps of smaller and dilated windows in each dimension")
    recover: bool = option(True, "each block makes good what those before it lost")
    epochs: float = option(0.0, "passes over the training data in which the blocks are trained; 0: none")
    learning_rate: float = option(1e-3, "the highest of that training")
    samples: int = option(256, "calibration samples whose second moments are taken")
    include: str | tuple[str, ...] = option("*", "layers that may be replaced, as glob patterns")
    exclude: str | tuple[str, ...] = option((), "layers that may not")

    def __post_init__(self) -> None:
        for name in self._kinds():
            if name not in FITS:
                raise StepError(f"lighten.Replace: there is no block {name!r}.", f"one of {', '.join(FITS)}, such as {near(name, FITS)}")
        for name, least in (("groups", 2), ("expansion", 1), ("kernel", 1), ("samples", 1), ("epochs", 0)):
            if getattr(self, name) < least:
                raise StepError(f"lighten.Replace: {name} is {getattr(self, name)}.", f"at least {least}")
        for name in ("ratio", "macs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise StepError(f"lighten.Replace: {name} is {value}.", "a share between 0 and 1, such as 0.5")
        if self.kernel % 2 == 0:
            raise StepError(f"lighten.Replace: kernel is {self.kernel}.", "an odd number, so that a window has a middle")

    def requires(self) -> tuple[str, ...]:
        return (*self.needs, "train") if self.epochs else self.needs

    def plan(self, graph: Graph, task: Task) -> Plan:
        uses = Counter(layer.weight for layer in layers(graph))
        evidence, skipped = Evidence(graph, task, self.samples), dict[str, str]()
        found, costs = dict[str, list[dict[str, Any]]](), dict[str, int]()
        for layer in select(graph, self.include, self.exclude, ("conv", "linear")):
            reason = "it shares its weight" if uses[layer.weight] > 1 else _reason(graph, layer)
            if reason is None:
                costs[layer.name] = dense_macs(layer, graph.tensor(layer.weight))
                ways, reason = self._ways(graph, layer, evidence)
                if ways:
                    found[layer.name] = ways
            if reason:
                skipped[layer.name] = reason
        changes = {name: ways[0] for name, ways in found.items()}
        if self.macs is not None and found:
            changes = within(found, costs, self.macs)
            skipped |= dict.fromkeys(found.keys() - changes.keys(), "the budget is kept with less loss elsewhere")
        return Plan(changes, skipped)

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        before, evidence = graph.copy(), Evidence(graph.copy(), task, self.samples)
        for layer in [layer for layer in layers(graph) if layer.name in plan.changes]:
            give_bias(graph, layer)
        known = {layer.name: layer for layer in layers(graph) if layer.name in plan.changes}
        seen = {twin.name: self._dense(graph, twin, evidence) for twin in layers(evidence.graph) if twin.name in known}

        def block(layer: Layer, matrix: Tensor, second: Tensor) -> tuple[list[Part], Tensor]:
            return FITS[plan.changes[layer.name]["by"]](replace(seen[layer.name][0], matrix=matrix, second=second))

        made, measured = {name: block(layer, seen[name][0].matrix, seen[name][0].second) for name, layer in known.items()}, dict[str, Any]()
        for name, (dense, mean) in seen.items():
            bias = graph.tensor(known[name].bias or "")
            bias.data += ((dense.matrix - made[name][1]) @ mean).to(bias)
        if self.recover and made:
            ways = {name: partial(block, layer) for name, layer in known.items()}
            made, measured = replaced(graph, before, (task, self.samples), made, ways)
        ends = {name: put(graph, layer, made[name][0], graph.tensor(layer.bias or "").detach().double()) for name, layer in known.items()}
        if self.epochs:
            measured |= recover_blocks(graph, before, ends, task, self.epochs, self.learning_rate, workdir)
        return measured

    def _kinds(self) -> tuple[str, ...]:
        return (self.by,) if isinstance(self.by, str) else self.by

    def _ways(self, graph: Graph, layer: Layer, evidence: Evidence) -> tuple[list[dict[str, Any]], str | None]:
        """What a layer can become that costs less, and why it can become nothing."""
        whole, ways, reasons = dense_macs(layer, graph.tensor(layer.weight)), list[dict[str, Any]](), list[str]()
        for kind in self._kinds():
            reason = self._unfit(layer, kind)
            if reason is None:
                dense, _ = self._dense(graph, layer, evidence)
                parts, matrix = FITS[kind](dense)
                cost = block_macs(layer, parts)
                reason = "it would cost no less" if cost >= whole else None
            if reason is not None:
                reasons.append(f"{kind}: {reason}")
                continue
            ways.append({"by": kind, "macs": [whole, cost], "lost": lost(dense, matrix)})
            if self.macs is None:
                break
        return ways, None if ways else "; ".join(reasons)

    def _unfit(self, layer: Layer, kind: str) -> str | None:
        """Why a layer cannot become a block of this kind."""
        window, sizes = shape_of(layer), [shape(node)[channel_dim(layer)] for node in (data(layer), layer.node)]
        if kind in ("grouped", "shuffled") and any(size % self.groups for size in sizes):
            return f"its {sizes[0]} inputs and {sizes[1]} outputs do not divide into {self.groups} groups"
        if kind == "ghost" and sizes[1] % 2:
            return "half of its outputs is no whole number"
        if layer.kind == "linear":
            return None if kind in _LINEAR else "it has no window"
        if kind in _WINDOWS and max(window) == 1:
            return "its window is a point"
        if kind in ("separable", "inverted") and sizes[0] * self.expansion * _FEW < min(sizes[1], sizes[0] * math.prod(window)):
            return f"filters for each of {sizes[0]} input channels are too few for its {sizes[1]} outputs"
        if kind in ("smaller", "dilated"):
            wide = [size for size in window if size > 1]
            if min(wide) <= self.kernel or any(size % 2 == 0 for size in wide):
                return f"its window {list(window)} is not odd and wider than {self.kernel}"
            if kind == "dilated" and (self.kernel < 2 or any((size - 1) % (self.kernel - 1) for size in wide) or len(set(wide)) > 1):
                return f"{self.kernel} taps cannot be spread evenly over {list(window)}"
        return None

    def _dense(self, graph: Graph, layer: Layer, evidence: Evidence) -> tuple[Dense, Tensor]:
        """The layer as its fits see it, and the mean of its columns [height]."""
        matrix = to_matrix(layer, graph.tensor(layer.weight).detach().double())[0]
        gram, mean, count = evidence.moments(layer)
        inputs, window = shape(data(layer))[channel_dim(layer)], shape_of(layer)
        return Dense(matrix, gram[0] / count, inputs, window, self.groups, self.expansion, self.ratio, self.kernel), mean[0]


def within(found: Mapping[str, list[dict[str, Any]]], whole: Mapping[str, int], share: float) -> dict[str, dict[str, Any]]:
    """The way of each layer, or none, by which the energy lost plus a price for what it costs is least, at one price for all.

    It is the lowest that keeps the budget, a share of `whole`, the costs of all layers; out of reach, the cheapest ways are taken.
    """
    total = sum(whole.values())

    def at(price: float) -> dict[str, dict[str, Any]]:
        chosen = {}
        for name, ways in found.items():
            best = min(ways, key=lambda way: way["lost"] + price * way["macs"][1] / total)
            if best["lost"] + price * best["macs"][1] / total < price * best["macs"][0] / total:
                chosen[name] = best
        return chosen

    def cost(chosen: Mapping[str, dict[str, Any]]) -> int:
        return total + sum(int(way["macs"][1] - way["macs"][0]) for way in chosen.values())

    low, high = 0.0, 1e9
    for _ in range(_ROUNDS):
        middle = (max(low, 1e-9) * high) ** 0.5
        low, high = (low, middle) if cost(at(middle)) <= share * total else (middle, high)
    return at(high)


def _reason(graph: Graph, layer: Layer) -> str | None:
    """Why a layer has no block that could take its place; None when it may have."""
    if (reason := irreplaceable(graph, layer)) is not None:
        return reason
    if layer.node.kwargs or graph.tensor(layer.weight).ndim < 2 or form(layer) is None:
        return "its arguments are not those of a plain layer"
    if layer.kind == "linear" and len(shape(data(layer))) not in (2, 3):
        return "what it reads is neither [n, channels] nor [n, positions, channels]"
    return None
