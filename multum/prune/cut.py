"""Structured pruning: what is cut out of the graph for good, be it channels, neurons or heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..analyze import Latencies
from ..analyze.evidence import Evidence
from ..errors import StepError, near
from ..graph import Graph, select, surgery
from ..graph.axes import Group, Groups, Keep, axes
from ..step import Plan, Stage, Step, option
from ..task import Task
from .allocation import ALLOCATIONS, TERMS, Budget, cumulated, least_loss
from .recover import recover_cut
from .scores import CRITERIA, CUMULATIVE, NEEDS
from .sensitivity import sensitivity

KINDS = ("conv", "linear", "embedding", "rnn")
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
    criterion: str | None = option(None, f"what judges a channel: {', '.join(CRITERIA)}; not given: obs with data, else magnitude")
    allocation: str | None = option(
        None,
        "uniform: the same share everywhere; global: the lowest scores of the whole network; budget: the lowest scores for what they save; "
        "sensitivity: the same with the measured change of the outputs; when not given: uniform, for obs global and within budgets budget",
    )
    multiple: int = option(8, "widths are multiples of this; in small layers of a half, a quarter ... of it; 0: what measures fast")
    floor: float = option(0.1, "least share of each group that is kept")
    include: str | tuple[str, ...] = option("*", "layers that may be cut, as glob patterns")
    exclude: str | tuple[str, ...] = option((), "layers that may not")
    threshold: float | None = option(None, "what scores lower than so many times the mean of its group goes; takes the place of ratio")
    parameters: float | None = option(None, "share of the parameters to keep; takes the place of ratio")
    macs: float | None = option(None, "share of the multiply-accumulates to keep; takes the place of ratio")
    latency: float | None = option(None, "share to keep of the layers' times, measured on this machine; takes the place of ratio")
    recover: bool = option(True, "let the layers that read what was cut make good, when there are calibration data")
    samples: int = option(512, "samples that data-based criteria and recovery look at")

    def requires(self) -> tuple[str, ...]:
        return NEEDS.get(self.criterion or "", ()) + (("calibration",) if self.allocation == "sensitivity" else ())

    def plan(self, graph: Graph, task: Task) -> Plan:
        self._check()
        groups = axes(graph)
        barred = self._barred(graph, groups)
        chosen = [group for group in groups if group.name not in barred]
        criterion = self._criterion(task)
        budgets, multiple = self._budgets(graph, groups), self.multiple or _fast(graph, groups)
        allocation = self.allocation or ("uniform" if criterion != "obs" else "budget" if budgets else "global")
        scores = self.scores(graph, groups, chosen, task)

        def keep(ratio: float) -> dict[str, list[int]]:
            wanted = _wanted(chosen, scores, ratio, allocation == "global") if self.threshold is None else _above(scores, self.threshold)
            widths = {group.name: self._width(group, wanted[group.name], groups, multiple) for group in chosen}
            return _keep(groups, chosen, scores, wanted, widths)

        if allocation in ("uniform", "global") or self.threshold is not None:
            kept = keep(self._ratio(budgets, keep))
        else:
            if not budgets:  # what the share leaves when it is the same everywhere
                uniform = Budget.make("macs", 1.0, graph, groups)
                budgets = [replace(uniform, share=uniform.left(keep(self.ratio)))]
            losses = {name: cumulated(score, criterion in CUMULATIVE) for name, score in scores.items()}
            if allocation == "sensitivity":
                losses = sensitivity(graph, groups, chosen, scores, task, self.samples)
            steps = {group.name: self._widths(group, groups, multiple) for group in chosen}
            kept = {name: best(scores[name], width) for name, width in least_loss(chosen, losses, steps, groups.factors, budgets).items()}
        changes = {name: {"keep": indices, "of": groups[name].size} for name, indices in kept.items()}
        return Plan(changes, _skipped(graph, groups, kept, barred))

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        keep = {name: change["keep"] for name, change in plan.changes.items()}
        return self._met(graph, keep) | self.remove(graph, keep, task)

    def remove(self, graph: Graph, keep: Keep, task: Task) -> dict[str, Any]:
        """Cuts all but `keep` out of the graph; what reads it makes good."""
        recovers = self.recover and task.has("calibration")
        original = graph.copy() if recovers else graph
        surgery.cut(graph, keep)
        return recover_cut(graph, original, keep, task, self.samples) if recovers else {}

    def scores(self, graph: Graph, groups: Groups, chosen: Sequence[Group], task: Task) -> dict[str, Tensor]:
        """What each channel of these groups is worth, by the criterion."""
        judge, evidence = CRITERIA[self._criterion(task)], Evidence(graph, task, self.samples)
        return {group.name: judge(evidence, groups, group) for group in chosen}

    def _criterion(self, task: Task) -> str:
        return self.criterion or ("obs" if task.has("calibration") else "magnitude")

    def _check(self) -> None:
        if self.criterion is not None and self.criterion not in CRITERIA:
            raise StepError(f"There is no criterion {self.criterion!r}.", f"one of the criteria, such as {near(self.criterion, CRITERIA)}")
        if self.allocation is not None and self.allocation not in ALLOCATIONS:
            raise StepError(f"The allocation is {self.allocation!r}.", ", ".join(ALLOCATIONS))
        if not 0 < self.ratio < 1:
            raise StepError(f"The share of channels to cut is {self.ratio}.", "a ratio between 0 and 1, such as 0.5")
        if self.threshold is not None and not 0 < self.threshold < math.inf:
            raise StepError(f"The threshold is {self.threshold}.", "a number above 0: so many times the mean of a group, such as 0.5")
        if self.threshold is not None and any(getattr(self, name) is not None for name in TERMS):
            raise StepError("A threshold is given, and a budget.", "one of the two")
        if self.multiple < 0:
            raise StepError(f"Widths cannot be multiples of {self.multiple}.", "a multiple of at least 1, such as 8, or 0")
        if self.samples < 1:
            raise StepError(f"{self.samples} samples are asked for.", "at least 1, such as 512")
        if not 0 <= self.floor < 1:
            raise StepError(f"The least share that is kept is {self.floor}.", "a floor from 0 to below 1, such as 0.1")
        for name in TERMS:
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

    def _width(self, group: Group, wanted: float, groups: Groups, multiple: int) -> int:
        """The width nearest to `wanted` that is a multiple of the step, the lower of two; the step is at most a quarter of the group."""
        step = multiple // math.gcd(multiple, groups.cofactor(group))
        while step > 1 and group.size < 4 * step:
            step = math.ceil(step / 2)
        least = max(1, math.ceil(group.size * self.floor))
        width = max(step, step * math.ceil(wanted / step - 0.5))
        while width < least:
            width += step
        return min(width, group.size)

    def _widths(self, group: Group, groups: Groups, multiple: int) -> list[int]:
        """The widths that a group may have, falling."""
        found = {self._width(group, wanted, groups, multiple) for wanted in range(1, group.size)}
        return sorted(found - {group.size}, reverse=True)

    def _budgets(self, graph: Graph, groups: Groups) -> list[Budget]:
        shares = {name: getattr(self, name) for name in TERMS}
        return [Budget.make(name, share, graph, groups) for name, share in shares.items() if share is not None]

    def _ratio(self, budgets: list[Budget], keep: Callable[[float], Keep]) -> float:
        """The least share to cut that meets the budgets; all, where they cannot be met."""
        if not budgets:
            return self.ratio
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            cut = keep(middle)
            enough = all(budget.left(cut) <= budget.share for budget in budgets)
            low, high = (low, middle) if enough else (middle, high)
        return high

    def _met(self, graph: Graph, keep: Keep) -> dict[str, Any]:
        """What is left of each budget, whether all are met, and if not, what is in the way."""
        groups = axes(graph)
        budgets = self._budgets(graph, groups)
        if not budgets:
            return {}
        left = {budget.name: budget.left(keep) for budget in budgets}
        missed = [budget.name for budget in budgets if left[budget.name] > budget.share * (1 + 1e-9)]
        found: dict[str, Any] = {"left": left, "met": not missed}
        if missed:
            barred = self._barred(graph, groups)
            some = next(((name, reason) for name, reason in barred.items()), None)
            found["binding"] = f"{', '.join(missed)}: every group that may be cut is at its floor ({self.floor:g} of it)"
            found["binding"] += f"; {len(barred)} may not, such as {some[0]}: {some[1]}" if some else ""
        return found


def best(scores: Tensor, width: int) -> list[int]:
    """The channels with the highest scores, in order."""
    indices: list[int] = sorted(scores.sort(descending=True, stable=True).indices[:width].tolist())
    return indices


def _fast(graph: Graph, groups: Groups) -> int:
    """The multiple of widths that is measured to be fast in the layer with the most multiply-accumulates."""
    table = Latencies(graph)
    sizes = {layer: graph.tensor(layer.weight).numel() for layer in groups.layers.values() if table.covers(layer)}
    return table.multiple(max(sizes, key=lambda layer: sizes[layer])) if sizes else 1


def _wanted(chosen: list[Group], scores: dict[str, Tensor], ratio: float, pooled: bool) -> dict[str, float]:
    """How many channels each group should keep, before rounding."""
    if not pooled or not chosen:
        return {group.name: group.size * (1 - ratio) for group in chosen}
    ordered = torch.cat([scores[group.name] for group in chosen]).sort().values
    threshold = ordered[min(int(ratio * len(ordered)), len(ordered) - 1)]
    return {group.name: float((scores[group.name] >= threshold).sum()) for group in chosen}


def _above(scores: dict[str, Tensor], threshold: float) -> dict[str, float]:
    """How many channels of each group score at least so many times the group's mean."""
    return {name: float((own >= threshold * own.mean()).sum()) for name, own in scores.items()}


def _keep(
    groups: Groups, chosen: list[Group], scores: dict[str, Tensor], wanted: dict[str, float], widths: dict[str, int]
) -> dict[str, list[int]]:
    """The channels with the highest scores of each group that gets narrower; of the factors of a product only one does."""
    cut: set[str] = set()
    for group in sorted(chosen, key=lambda group: abs(widths[group.name] - wanted[group.name]) > _CLOSE * group.size):
        if widths[group.name] < group.size and not any(other.name in cut for other in groups.factors(group)):
            cut.add(group.name)
    return {group.name: best(scores[group.name], widths[group.name]) for group in chosen if group.name in cut}


def _skipped(graph: Graph, groups: Groups, keep: Keep, barred: dict[str, str]) -> dict[str, str]:
    """Why the outputs of a layer are not cut, for each layer of which none are."""
    skipped = {}
    for layer in select(graph, kinds=KINDS):
        outputs = groups.outputs(layer.name)
        if not any(group.name in keep for group in outputs):
            reasons = [barred.get(group.name, "it is too narrow") for group in outputs]
            skipped[layer.name] = reasons[0] if reasons else "it has a single output"
    return skipped
