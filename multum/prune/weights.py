"""Unstructured pruning: single weights are set to zero. Files get smaller, not networks faster."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..analyze.evidence import Evidence
from ..errors import StepError
from ..graph import Graph, Layer
from ..step import Plan, Stage, Step, option
from ..task import Task
from .criteria import CRITERIA, LAYERWISE
from .masks import check_masking, criterion_needs, mask, maskable
from .obs import SURGEONS, Choice


@dataclass(frozen=True)
class Weights(Step):
    """Sets the weights with the lowest scores to zero, for good: later training and rounding leave them zero.

    No engine here computes faster for it; the coded file gets smaller. With calibration data the weights that stay make good
    what is lost, layer by layer, and the statistics of batch norms are measured anew.
    """

    stage: ClassVar[Stage | None] = Stage.VALUES

    ratio: float = option(0.5, "share of the weights that becomes zero")
    criterion: str | None = option(None, f"what judges a weight: {', '.join((*CRITERIA, *SURGEONS))}; not given: obs with data, else lamp")
    allocation: str = option("global", "global: the lowest scores of the whole network; uniform: the same share of every layer")
    threshold: float | None = option(None, "what scores lower becomes zero (uniform: than so many times the layer's mean); for ratio")
    probability: float | None = option(None, "each weight becomes zero with this probability; for ratio")
    floor: float = option(0.01, "least share of each layer that is kept")
    recover: bool = option(True, "let the other weights make good, when there are calibration data")
    samples: int = option(512, "samples that data-based criteria and recovery look at")
    include: str | tuple[str, ...] = option("*", "glob patterns of layers")
    exclude: str | tuple[str, ...] = option((), "glob patterns of layers to leave whole")

    def __post_init__(self) -> None:
        check_masking(self.criterion, self.ratio, self.samples)
        if self.allocation not in ("global", "uniform"):
            raise StepError(f"The allocation is {self.allocation!r}.", "global or uniform")
        if not 0 <= self.floor < 1:
            raise StepError(f"The least share that is kept is {self.floor}.", "a floor from 0 to below 1, such as 0.01")
        if self.probability is not None and not 0 < self.probability < 1:
            raise StepError(f"The probability is {self.probability}.", "a probability between 0 and 1")
        if self.probability is not None and self.criterion not in (None, "random"):
            raise StepError(f"A probability is given, and the criterion {self.criterion!r}.", "one of the two")

    def requires(self) -> tuple[str, ...]:
        return criterion_needs(self.criterion)

    def plan(self, graph: Graph, task: Task) -> Plan:
        chosen, skipped = maskable(graph, self.include, self.exclude)
        criterion = self._criterion(task)
        zeros = self._zeros(Evidence(graph, task, self.samples), chosen, criterion)
        changes = {}
        for layer in chosen:
            size = graph.tensor(layer.weight).numel()
            count = min(zeros[layer.name], size - max(1, math.ceil(self.floor * size)))
            if count > int((graph.tensor(layer.weight) == 0).sum()):
                changes[layer.name] = {"zeros": count, "of": size, "criterion": criterion}
            else:
                skipped[layer.name] = "none of its weights is among the lowest"
        return Plan(changes, skipped)

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        choices = {name: lowest(change["zeros"], change["of"]) for name, change in plan.changes.items()}
        mask(graph, task, choices, self._criterion(task), self.samples, self.recover and task.has("calibration"))
        return {}

    def _criterion(self, task: Task) -> str:
        if self.probability is not None:
            return "random"
        if self.criterion is None and self.threshold is not None:
            return "l1"
        return self.criterion or ("obs" if self.recover and task.has("calibration") else "lamp")

    def _zeros(self, evidence: Evidence, chosen: list[Layer], criterion: str) -> dict[str, int]:
        """How many weights of each layer should go."""
        if self.allocation == "uniform" and self.threshold is None and self.probability is None:
            return {layer.name: round(self.ratio * evidence.graph.tensor(layer.weight).numel()) for layer in chosen}
        # what is measured on one layer's outputs says nothing about another's: there LAMP decides how much each layer gives
        judge = CRITERIA["lamp" if criterion in (*LAYERWISE, *SURGEONS) and self.threshold is None else criterion]
        scores = {layer.name: judge(evidence, layer).flatten() for layer in chosen}
        bounds: dict[str, Tensor | float]
        if self.probability is not None:
            bounds = dict.fromkeys(scores, self.probability)
        elif self.threshold is not None:
            bounds = {name: self.threshold * (float(own.mean()) if self.allocation == "uniform" else 1) for name, own in scores.items()}
        else:
            pooled = torch.cat(list(scores.values())) if scores else torch.zeros(1)
            bounds = dict.fromkeys(scores, pooled.sort().values[min(round(self.ratio * len(pooled)), len(pooled) - 1)])
        return {name: int((own < bounds[name]).sum()) for name, own in scores.items()}


def lowest(zeros: int, size: int) -> Choice:
    """Chooses the lowest scores, `zeros` of all `size`; of a part of the columns its share."""

    def choose(scores: Tensor, columns: slice, part: float) -> Tensor:
        each = zeros * part * scores.shape[0] * scores.shape[1] / size
        count = round(each * columns.stop) - round(each * columns.start)
        chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
        chosen[scores.flatten().sort(stable=True).indices[:count]] = True
        return chosen.reshape(scores.shape)

    return Choice(choose)
