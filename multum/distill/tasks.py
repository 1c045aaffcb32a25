"""Distillation of a network with several outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import StepError, near
from ..graph import Graph
from ..step import Plan, option
from ..task import Task, call, tensors
from ..train.losses import imitations
from .hidden import weights
from .logits import Logits

_PLACE = "tasks.variances"  # the name of the logarithms of the variances while they train
_FASTER = 10.0  # than a weight: so that they get somewhere in a short training


@dataclass(frozen=True)
class Tasks(Logits):
    """Trains a network with several outputs, each with a weight, toward the original's outputs and toward their own losses.

    Outputs are named by their keys, or by their places, as in 'boxes', '1' or 'heads.0'. The task's loss gives a number for each, in a
    dict or a tuple as the outputs are; one number for all has weight 1. `uncertain` learns the weights: each output's loss is divided by
    a variance that is trained with it (Kendall et al. 2018, section 3.2).
    """

    outputs: tuple[str, ...] = option((), "outputs with their weights: ('digit=2', 'parity=0.5'); those not named weigh 1, with 0 none")
    uncertain: bool = option(False, "learn the weights, from those given on")

    def plan(self, graph: Graph, task: Task) -> Plan:
        changes = super().plan(graph, task).changes["*"]
        with torch.no_grad():
            answer = call(task.original, task.example)
        found = list(imitations(answer, answer, None, self.temperature))
        given = weights(self.outputs)
        for name in given:
            if name not in found:
                raise StepError(f"There is no output {name!r}.", f"one of {', '.join(found)}, such as {near(name, found)}")
        if self.uncertain and self.baseline:
            raise StepError("Weights are learned with the original as teacher.", "baseline=False, or uncertain=False")
        if not any(given.get(name, 1.0) for name in found):
            raise StepError(f"No output has a weight: {self.outputs}.", "at least one above 0")
        if len(found) < 2:
            raise StepError("The network has one output.", "several", "distill.Logits")
        return Plan({"*": changes | {"outputs": {name: given.get(name, 1.0) for name in found}, "uncertain": self.uncertain}})

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        given: dict[str, float] = {name: weight for name, weight in plan.changes["*"]["outputs"].items() if weight}
        names = list(given)
        if self.uncertain:
            graph.set_tensor(_PLACE, torch.zeros(len(names), device=next(graph.parameters()).device), parameter=True)

        def weighted(terms: Mapping[str, Tensor]) -> Tensor:
            rows = [given[name] * terms[name] for name in names]
            if self.uncertain:
                rows = [(-_FASTER * spread).exp() * row for spread, row in zip(graph.tensor(_PLACE), rows, strict=True)]
            return sum(rows[1:], rows[0])

        def alike(outputs: Any, teacher: Any, targets: Any) -> Tensor:
            return weighted(imitations(outputs, teacher, targets, self.temperature, self.likeness))

        def own(outputs: Any, targets: Any) -> Any:
            assert task.loss is not None
            value = task.loss(outputs, targets)
            if isinstance(value, Tensor):
                return value
            rows = dict(value) if isinstance(value, Mapping) else dict(zip(plan.changes["*"]["outputs"], tensors(value), strict=False))
            if missing := [name for name in names if name not in rows]:
                told = f"The task's loss says nothing of the output {missing[0]!r}, only of {', '.join(rows)}."
                raise StepError(told, "one number for each")
            return weighted(rows)

        def spreads(seen: Any, outputs: Any, targets: Any, held: Callable[[Any], Tensor]) -> Tensor:
            return _FASTER * graph.tensor(_PLACE).sum() / 2

        taught = {"alike": alike} | ({"also": spreads} if self.uncertain else {})
        measured = self._learn(graph, plan, task.but(loss=own if task.loss else None), workdir, **taught)
        if self.uncertain:
            found = (-_FASTER * graph.tensor(_PLACE).detach()).exp().tolist()
            del graph.tensors._modules["tasks"]
            measured |= {"weights": {name: given[name] * weight for name, weight in zip(names, found, strict=True)}}
        return measured
