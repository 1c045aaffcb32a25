"""Structured pruning: what is cut out of the graph for good, be it channels, neurons or heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import StepError, near
from ..graph import Graph, select, surgery
from ..graph.axes import Group, Groups, Keep, axes
from ..step import Plan, Stage, Step, option
from ..task import Task
from . import counts
from .evidence import Evidence
from .recover import calibrated, recover_cut
from .scores import CRITERIA, NEEDS

KINDS = ("conv", "linear", "embedding", "rnn")
_ALLOCATIONS = ("uniform", "global")
_HALVINGS = 14  # of the interval in which the share to cut is sought
_CLOSE = 0.05  # of a group: how far a width may be from the one asked for and still be preferred to a later factor


@dataclass(frozen=True)
class Cut(Step):
    """What all steps that cut channels share: how many, which, what goes along, and how the layers that read them make good.

    `kinds` are the kinds of groups that a step cuts (keys of `graph.axis_kinds.KINDS`); all when empty.
    """

    stage: ClassVar[Stage | None] = Stage.STRUCTURE
    kinds: ClassVar[tuple[str, ...]] = ()

    ratio: float = option(0.5, "share of the channels that is cut")
    criterion: str | None = option(
        None, f"what a channel is judged by: {', '.join(CRITERIA)}; obs with calibration data, magnitude without when not given"
    )
    allocation: str | None = option(
        None, "uniform: the same share everywhere; global: the lowest scores of the whole network; global for obs when not given"
    )
    multiple: int = option(8, "widths that are left are multiples of this; smaller layers, of a half, a quarter ... of it")
    floor: float = option(0.1, "least share of each group that is kept")
    include: str | tuple[str, ...] = option("*", "layers that may be cut, as glob patterns")
    exclude: str | tuple[str, ...] = option((), "layers that may not")
    parameters: float | None = option(None, "share of the parameters to keep; takes the place of ratio")
    macs: float | None = option(None, "share of the multiply-accumulates to keep; takes the place of ratio")
    recover: bool = option(True, "let the layers that read what was cut make good, when there are calibration data")
    samples: int = option(512, "samples that data-based criteria and recovery look at")

    def requires(self) -> tuple[str, ...]:
        return NEEDS.get(self.criterion or "", ())

    def plan(self, graph: Graph, task: Task) -> Plan:
        self._check()
        groups = axes(graph)
        barred = self._barred(graph, groups)
        chosen = [group for group in groups if group.name not in barred]
        criterion = self.criterion or ("obs" if calibrated(task) else "magnitude")
        allocation = self.allocation or ("global" if criterion == "obs" else "uniform")
        evidence = Evidence(graph, task, self.samples)
        scores = {group.name: CRITERIA[criterion](evidence, groups, group) for group in chosen}

        def keep(ratio: float) -> dict[str, list[int]]:
            wanted = _wanted(chosen, scores, ratio, allocation)
            return _keep(groups, chosen, scores, wanted, {group.name: self._width(group, wanted[group.name], groups) for group in chosen})

        kept = keep(self._ratio(graph, groups, keep))
        changes = {name: {"keep": indices, "of": groups[name].size} for name, indices in kept.items()}
        return Plan(changes, _skipped(graph, groups, kept, barred))

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        keep = {name: change["keep"] for name, change in plan.changes.items()}
        recovers = self.recover and calibrated(task)
        original = graph.copy() if recovers else graph
        surgery.cut(graph, keep)
        return recover_cut(graph, original, keep, task, self.samples) if recovers else {}

    def _check(self) -> None:
        if self.criterion is not None and self.criterion not in CRITERIA:
            raise StepError(f"There is no criterion {self.criterion!r}.", f"one of the criteria, such as {near(self.criterion, CRITERIA)}")
        if self.allocation is not None and self.allocation not in _ALLOCATIONS:
            raise StepError(f"The allocation is {self.allocation!r}.", " or ".join(_ALLOCATIONS))
        if not 0 < self.ratio < 1:
            raise StepError(f"The share of channels to cut is {self.ratio}.", "a ratio between 0 and 1, such as 0.5")
        if self.multiple < 1:
            raise StepError(f"Widths cannot be multiples of {self.multiple}.", "a multiple of at least 1, such as 8")
        if self.samples < 1:
            raise StepError(f"{self.samples} samples are asked for.", "at least 1, such as 512")
        if not 0 <= self.floor < 1:
            raise StepError(f"The least share that is kept is {self.floor}.", "a floor from 0 to below 1, such as 0.1")
        for name in ("parameters", "macs"):
            share = getattr(self, name)
            if share is not None and not 0 < share < 1:
                raise StepError(f"The share of {name} to keep is {share}.", f"{name} between 0 and 1, such as 0.3")

    def _barred(self, graph: Graph, groups: Groups) -> dict[str, str]:
        """The groups that are left alone, with the reason."""
        known = {layer.name for layer in select(graph, kinds=KINDS)}
        wanted = {layer.name for layer in select(graph, self.include, self.exclude, KINDS)}
        unwanted = {layer.name for layer in select(graph, self.exclude, kinds=KINDS)} if self.exclude else set()
        barred: dict[str, str] = {}
        for group in groups:
            own = set(group.producers) & known
            if group.reason:
                barred[group.name] = group.reason
            elif self.kinds and group.kind not in self.kinds:
                barred[group.name] = f"its outputs are {group.kind}"
            elif excluded := sorted(own & unwanted):
                barred[group.name] = f"{excluded[0]} is excluded"
            elif not own & wanted:
                barred[group.name] = "include does not name it" if own else "no layer makes it"
        return barred

    def _width(self, group: Group, wanted: float, groups: Groups) -> int:
        """The width nearest to `wanted` that is a multiple of the step, the lower of two; the step is at most a quarter of the group."""
        step = self.multiple // math.gcd(self.multiple, groups.cofactor(group))
        while step > 1 and group.size < 4 * step:
            step = math.ceil(step / 2)
        least = max(1, math.ceil(group.size * self.floor))
        width = max(step, step * math.ceil(wanted / step - 0.5))
        while width < least:
            width += step
        return min(width, group.size)

    def _ratio(self, graph: Graph, groups: Groups, keep: Callable[[float], Keep]) -> float:
        """The least share to cut with which as few parameters and multiply-accumulates are left as asked for."""
        goals = [(share, count) for share, count in ((self.parameters, counts.parameters), (self.macs, counts.macs)) if share is not None]
        if not goals:
            return self.ratio
        low, high = 0.0, 1.0
        before = [count(graph, groups, {}) for _, count in goals]

        def left(ratio: float) -> list[float]:
            cut = keep(ratio)
            return [count(graph, groups, cut) / whole for (_, count), whole in zip(goals, before, strict=True)]

        if any(value > share for value, (share, _) in zip(left(high), goals, strict=True)):
            least = " and ".join(f"{value:.3f} of the {count.__name__}" for value, (_, count) in zip(left(high), goals, strict=True))
            raise StepError(
                f"{self} is out of reach: when everything that may go is cut, {least} are left.",
                "shares to keep above that",
                "ask for less, lower floor, or let other methods do the rest",
            )
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            enough = all(value <= share for value, (share, _) in zip(left(middle), goals, strict=True))
            low, high = (low, middle) if enough else (middle, high)
        return high


def _wanted(chosen: list[Group], scores: dict[str, Tensor], ratio: float, allocation: str) -> dict[str, float]:
    """How many channels each group should keep, before rounding."""
    if allocation == "uniform" or not chosen:
        return {group.name: group.size * (1 - ratio) for group in chosen}
    pooled = torch.cat([scores[group.name] for group in chosen]).sort().values
    threshold = pooled[min(int(ratio * len(pooled)), len(pooled) - 1)]
    return {group.name: float((scores[group.name] >= threshold).sum()) for group in chosen}


def _keep(
    groups: Groups, chosen: list[Group], scores: dict[str, Tensor], wanted: dict[str, float], widths: dict[str, int]
) -> dict[str, list[int]]:
    """The channels with the highest scores of each group that gets narrower; of the factors of a product only one does."""
    cut: set[str] = set()
    for group in sorted(chosen, key=lambda group: abs(widths[group.name] - wanted[group.name]) > _CLOSE * group.size):
        if widths[group.name] < group.size and not any(other.name in cut for other in groups.factors(group)):
            cut.add(group.name)
    return {
        group.name: sorted(scores[group.name].sort(descending=True, stable=True).indices[: widths[group.name]].tolist())
        for group in chosen
        if group.name in cut
    }


def _skipped(graph: Graph, groups: Groups, keep: Keep, barred: dict[str, str]) -> dict[str, str]:
    """Why the outputs of a layer are not cut, for each layer of which none are."""
    skipped = {}
    for layer in select(graph, kinds=KINDS):
        outputs = groups.outputs(layer.name)
        if not any(group.name in keep for group in outputs):
            reasons = [barred.get(group.name, "it is too narrow") for group in outputs]
            skipped[layer.name] = reasons[0] if reasons else "it has a single output"
    return skipped
