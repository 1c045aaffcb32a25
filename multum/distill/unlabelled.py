"""Distillation on data that nobody labelled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..graph import Graph
from ..step import Plan, option
from ..task import Task
from .logits import Logits


@dataclass(frozen=True)
class Unlabelled(Logits):
    """Trains toward the outputs of the original alone (Ba & Caruana 2014, section 2.2), on train or else on calibration data.

    Targets are not looked at; they may be None.
    """

    needs: ClassVar[tuple[str, ...]] = ("calibration",)

    alpha: float = option(1.0, "1: there is nothing but the original's outputs")

    def plan(self, graph: Graph, task: Task) -> Plan:
        return super().plan(graph, task.but(loss=None))

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        data = task.train if task.train is not None else task.calibration
        return super().apply(graph, plan, task.but(loss=None, train=data), workdir)
