"""Distillation in steps of size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import StepError
from ..graph import Graph
from ..step import Plan, option
from ..task import Task
from ..train import Teacher
from .logits import Logits
from .student import student


@dataclass(frozen=True)
class Assistant(Logits):
    """Teaches networks of sizes in between first, each the teacher of the next (Mirzadeh et al. 2020, section 3).

    They are cut out of the original as `distill.student` does, and each is trained as long as the student, which comes last.
    """

    widths: tuple[float, ...] = option((0.7,), "share of the channels of each assistant, the first to be taught first")
    depths: tuple[float, ...] = option((), "share of the residual blocks of each; all when none")

    def plan(self, graph: Graph, task: Task) -> Plan:
        depths = self.depths or (1.0,) * len(self.widths)
        if not self.widths or len(depths) != len(self.widths):
            raise StepError(f"The assistants' widths are {self.widths}, their depths {self.depths}.", "as many of both, at least one")
        sizes = [sum(p.numel() for p in student(task.original, *shares).parameters()) for shares in zip(self.widths, depths, strict=True)]
        assistants = [[width, depth, size] for width, depth, size in zip(self.widths, depths, sizes, strict=True)]
        return Plan({"*": super().plan(graph, task).changes["*"] | {"assistants": assistants}})

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        teacher, found = task.original, []
        how = self._training(graph)
        for place, (width, depth, _) in enumerate(plan.changes["*"]["assistants"]):
            one, folder = student(task.original, width, depth), workdir and workdir / f"assistant{place}"
            history = self._learn(one, plan, task, folder, teacher=Teacher(teacher, memory=how.remembered()))
            found.append(history["loss_last"])
            teacher = one
        told = self._learn(graph, plan, task, workdir, teacher=Teacher(teacher, memory=how.remembered()))
        return told | {"assistants": found}
