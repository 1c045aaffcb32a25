"""Rewinding: what is left of a pruned network goes back to the values that it once had."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import StepError
from ..graph import Graph
from ..graph.sparse import sparse_weights
from ..step import Plan, Stage, Step, option
from ..task import Task


@dataclass(frozen=True)
class Rewind(Step):
    """Gives the weights that are not zero the values of the original, or of an earlier checkpoint; the zeros stay.

    Training from there again is "weight rewinding" (Frankle et al. 2020, section 3; Renda, Frankle & Carbin 2020, section 2).
    """

    stage: ClassVar[Stage | None] = Stage.VALUES

    checkpoint: str = option("", "a safetensors file with the values, by the names of the model's state; the original's when not given")

    def plan(self, graph: Graph, task: Task) -> Plan:
        values, changes, skipped = self._values(task), dict[str, dict[str, Any]](), dict[str, str]()
        zero = set(sparse_weights(graph))
        if not zero:
            return Plan({}, {"*": "no weight was set to zero; prune.Weights or prune.Gradual comes before"})
        for name, now in graph.named_tensors():
            if name not in values:
                skipped[name] = "the checkpoint does not have it"
            elif values[name].shape != now.shape:
                skipped[name] = f"it is {list(now.shape)} here and {list(values[name].shape)} there"
            elif now.is_floating_point():
                changes[name] = {"zeros_kept": int((now == 0).sum()) if name in zero else 0}
        return Plan(changes, skipped)

    @torch.no_grad()
    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        values = self._values(task)
        for name in plan.changes:
            graph.tensor(name).copy_(values[name])  # `compress` keeps the zeros of sparse weights
        return {}

    def _values(self, task: Task) -> dict[str, Tensor]:
        if not self.checkpoint:
            return dict(task.original.named_tensors())
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self.checkpoint)
        except (OSError, SafetensorError) as error:
            raise StepError(f"The checkpoint {self.checkpoint!r} cannot be read: {error}", "a safetensors file") from error
