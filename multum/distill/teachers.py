"""Distillation from several teachers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import StepError
from ..graph import Graph, spec
from ..pack import load
from ..step import Plan, option
from ..task import Task, logits
from ..train import Teacher
from .logits import Logits


@dataclass(frozen=True)
class Teachers(Logits):
    """Trains toward several networks at once: the original and those in `.mip` files (You et al. 2017, section 3.1; Fukuda et al. 2017).

    They give the same outputs for the same inputs. `mean`: the weighted mean of their outputs, which for logits is the geometric mean of
    their probabilities. `best`: for each sample the outputs of the one that is least wrong about its target; weights do not count.
    """

    files: str | tuple[str, ...] = option((), "the other teachers: .mip files")
    weights: tuple[float, ...] = option((), "of the original and of each file; alike when none")
    choice: str = option("mean", "mean or best")

    def plan(self, graph: Graph, task: Task) -> Plan:
        files, changes = self._files(), super().plan(graph, task).changes["*"]
        if not files:
            raise StepError("There is no other teacher than the original.", ".mip files of the same task", "distill.Logits")
        if self.choice not in ("mean", "best"):
            raise StepError(f"The choice is {self.choice!r}.", "'mean' or 'best'")
        weights = self.weights or (1.0,) * (1 + len(files))
        if len(weights) != 1 + len(files) or min(weights) < 0 or sum(weights) <= 0:
            raise StepError(f"The weights of {1 + len(files)} teachers are {weights}.", "a number from 0 on for each, not all 0")
        return Plan({"*": changes | {"teachers": ["the original", *files], "weights": list(weights), "choice": self.choice}})

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        teachers = [task.original, *map(load, self._files())]
        panel = _Panel(teachers, plan.changes["*"]["weights"], self.choice == "best", self._training(graph).remembered())
        return self._learn(graph, plan, task, workdir, teacher=panel)

    def _files(self) -> tuple[str, ...]:
        return (self.files,) if isinstance(self.files, str) else self.files


class _Panel:
    """Teachers that answer as one."""

    def __init__(self, graphs: Sequence[Graph], weights: Sequence[float], best: bool, memory: float):
        self.teachers = [Teacher(graph, memory=memory / len(graphs)) for graph in graphs]
        self.shares, self.best, self.outputs = [weight / sum(weights) for weight in weights], best, graphs[0].outputs

    def __call__(self, inputs: Any, targets: Any) -> Any:
        answers = [teacher(inputs) for teacher in self.teachers]
        leaves = [spec.flatten(answer, self.outputs) for answer in answers]
        for others in leaves[1:]:
            if [leaf.shape for leaf in others] != [leaf.shape for leaf in leaves[0]]:
                shapes = [[list(leaf.shape) for leaf in found] for found in (leaves[0], others)]
                raise StepError(f"The teachers give {shapes[0]} and {shapes[1]}.", "the same outputs with the same number of classes")
        if not self.best:
            return spec.unflatten([self._mean(own) for own in zip(*leaves, strict=True)], self.outputs)
        wrong = torch.stack(
            [_wrong(logits(answer), targets) / max(share, 1e-12) for answer, share in zip(answers, self.shares, strict=True)]
        )
        chosen, samples = wrong.argmin(0), torch.arange(wrong.shape[1], device=wrong.device)
        return spec.unflatten([torch.stack(own)[chosen, samples] for own in zip(*leaves, strict=True)], self.outputs)

    def _mean(self, leaves: Sequence[Tensor]) -> Tensor:
        if not leaves[0].is_floating_point():
            return leaves[0]
        return sum((share * leaf for share, leaf in zip(self.shares, leaves, strict=True)), start=torch.zeros_like(leaves[0]))


def _wrong(output: Tensor, targets: Any) -> Tensor:
    """How far each sample's output is from its target [n]: cross-entropy with classes, squared error with values."""
    if isinstance(targets, Tensor) and targets.shape == output.shape:
        return (output - targets).square().flatten(1).mean(1)
    dim = 1 if output.ndim == 4 else output.ndim - 1
    if isinstance(targets, Tensor) and not targets.is_floating_point() and targets.shape == output.shape[:dim] + output.shape[dim + 1 :]:
        return F.cross_entropy(output.movedim(dim, 1), targets, reduction="none").reshape(len(output), -1).mean(1)
    raise StepError("Which teacher is least wrong cannot be told.", "targets: labels, or values of the outputs' shape", "choice='mean'")
