"""N:M sparsity and blocks: zeros in regular patterns. Files get smaller; no engine here computes faster for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import StepError
from ..graph import Graph, Layer
from ..graph.matrix import to_matrix
from ..step import Plan, Stage, Step, option
from ..task import Task
from .criteria import CRITERIA
from .masks import check_masking, criterion_needs, mask, maskable
from .obs import SURGEONS, Choice
from .weights import lowest


@dataclass(frozen=True)
class NM(Step):
    """Keeps n of every m neighbouring input channels of each output (2:4, Mishra et al. 2021), or whole blocks of outputs x inputs (4x1).

    Zeros stay zero in later steps. With calibration data the weights that stay make good what is lost.
    """

    stage: ClassVar[Stage | None] = Stage.VALUES

    pattern: str = option("2:4", "n:m, such as 2:4 or 4:8: n of m are kept; or outputs x inputs of a block, such as 4x1")
    ratio: float = option(0.5, "share of the blocks that becomes zero; n:m says it by itself")
    criterion: str | None = option(None, f"what judges a weight: {', '.join((*CRITERIA, *SURGEONS))}; not given: obs with data, else l1")
    recover: bool = option(True, "let the other weights make good, when there are calibration data")
    samples: int = option(512, "samples that data-based criteria and recovery look at")
    include: str | tuple[str, ...] = option("*", "glob patterns of layers")
    exclude: str | tuple[str, ...] = option((), "glob patterns of layers to leave whole")

    def __post_init__(self) -> None:
        check_masking(self.criterion, self.ratio, self.samples)
        kept, every, _ = _parse(self.pattern)
        if kept and not kept < every:
            raise StepError(f"The pattern {self.pattern!r} keeps {kept} of every {every}.", "fewer kept than there are, such as 2:4")

    def requires(self) -> tuple[str, ...]:
        return criterion_needs(self.criterion)

    def plan(self, graph: Graph, task: Task) -> Plan:
        chosen, skipped = maskable(graph, self.include, self.exclude)
        kept, down, across = _parse(self.pattern)
        changes = {}
        for layer in chosen:
            _, outputs, inputs, _ = _form(graph, layer)
            if kept and inputs % down:
                skipped[layer.name] = f"its {inputs} input channels are no multiple of {down}"
            elif not kept and (outputs % down or inputs % across):
                skipped[layer.name] = f"its {outputs} x {inputs} channels do not divide into blocks of {self.pattern}"
            else:
                share = 1 - kept / down if kept else self.ratio
                changes[layer.name] = {"pattern": self.pattern, "zeros": round(share * graph.tensor(layer.weight).numel())}
        return Plan(changes, skipped)

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        chosen, _ = maskable(graph, self.include, self.exclude)
        choices = {layer.name: self._choose(_form(graph, layer)[3]) for layer in chosen if layer.name in plan.changes}
        recovers = self.recover and task.has("calibration")
        mask(graph, task, choices, self.criterion or ("obs" if recovers else "l1"), self.samples, recovers)
        return {}

    def _choose(self, window: int) -> Choice:
        kept, down, across = _parse(self.pattern)

        def neighbours(scores: Tensor, columns: slice, part: float) -> Tensor:
            groups, outputs, width = scores.shape
            apart = scores.reshape(groups, outputs, -1, down, window)
            order = apart.sort(dim=3, stable=True).indices[:, :, :, : round(part * (down - kept))]
            return torch.zeros_like(apart, dtype=torch.bool).scatter_(3, order, True).reshape(groups, outputs, width)

        def blocks(scores: Tensor, columns: slice, part: float) -> Tensor:
            groups, outputs, width = scores.shape
            apart = scores.reshape(groups, outputs // down, down, -1, across, window).sum((2, 4))
            flat = apart.reshape(groups, outputs // down, -1)
            share = lowest(round(self.ratio * flat.numel()), flat.numel())
            gone = share.choose(flat, slice(0, flat.shape[2]), part).reshape(apart.shape)[:, :, None, :, None]
            return gone.expand(groups, outputs // down, down, -1, across, window).reshape(groups, outputs, width)

        return Choice(neighbours if kept else blocks, (down if kept else across) * window)


def _parse(pattern: str) -> tuple[int, int, int]:
    """(n, m, 1) for n:m, (0, outputs, inputs) for a block."""
    if found := re.fullmatch(r"(\d+):(\d+)", pattern):
        kept, every = map(int, found.groups())
        if kept >= 1:
            return kept, every, 1
    elif found := re.fullmatch(r"(\d+)x(\d+)", pattern):
        down, across = map(int, found.groups())
        if down * across > 1:
            return 0, down, across
    raise StepError(f"{pattern!r} is no pattern.", "n:m such as 2:4, or outputs x inputs of a block such as 4x1")


def _form(graph: Graph, layer: Layer) -> tuple[int, int, int, int]:
    """Groups, outputs and inputs of a group, and elements of the window of a layer's weight."""
    weight = graph.tensor(layer.weight)
    groups, outputs, columns = to_matrix(layer, weight.detach()).shape
    window = weight.shape[2:].numel()
    return groups, outputs, columns // window, window
