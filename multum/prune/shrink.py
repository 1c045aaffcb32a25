"""Channels that fade while the network trains, and are cut then: in one go or in rounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import StepError
from ..graph import Graph
from ..graph.axes import Group, Groups, axes
from ..step import Plan, option
from ..task import Task
from ..train import OPTIMIZER, Companion, Training, recover
from .cut import Cut, best

_PENALTIES = ("growing", "lasso", "slimming", "none")


@dataclass(frozen=True)
class Shrink(Cut):
    """Cuts channels after, and between, trainings toward the original in which a penalty draws them to zero.

    The plan says how wide each group will be. `growing`: those that would go are drawn to zero, harder and harder (Wang et al. 2021,
    section 3.2); `lasso`: the norms of all channels are in the loss (group lasso; Wen et al. 2016, section 3.1); `slimming`: the scales
    of the normalizations (Liu et al. 2017, section 3); `none`: rounds of training and cutting alone. Which go is decided when they go.
    """

    needs: ClassVar[tuple[str, ...]] = ("train",)

    penalty: str = option("growing", f"what draws channels to zero: {', '.join(_PENALTIES)}")
    strength: float = option(1.0, "of the penalty, as a number of the loss: what it is at the beginning, and where growing ends")
    rounds: int = option(1, "how often it is trained and cut")
    epochs: float = option(1.0, "passes over the training data, in all rounds together")
    learning_rate: float | None = option(None, "highest learning rate; found from the graph when not given")
    optimizer: str = option("adamw", OPTIMIZER)

    def __post_init__(self) -> None:
        Training(optimizer=self.optimizer)  # which refuses what it does not know
        if self.penalty not in _PENALTIES:
            raise StepError(f"The penalty is {self.penalty!r}.", f"one of {', '.join(_PENALTIES)}")
        if self.rounds < 1 or not 0 <= self.strength < math.inf:
            raise StepError(f"There are {self.rounds} rounds with a strength of {self.strength}.", "at least one round, a strength from 0")

    def requires(self) -> tuple[str, ...]:
        return (*self.needs, *super().requires())

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        last = {name: (len(change["keep"]), change["of"]) for name, change in plan.changes.items()}
        measured = self._met(graph, {name: range(width) for name, (width, _) in last.items()})
        trainings = []
        for turn in range(1, self.rounds + 1):
            widths = {name: width + round((size - width) * (1 - turn / self.rounds)) for name, (width, size) in last.items()}
            how = Training.of(graph, self.learning_rate, self.optimizer, epochs=self.epochs / self.rounds)
            trainings.append(recover(graph, task, how, workdir and workdir / f"round-{turn}", self._companions(graph, task, widths)))
            groups = axes(graph)
            scores = self.scores(graph, groups, [groups[name] for name in widths], task)
            keep = {name: best(scores[name], width) for name, width in widths.items() if width < groups[name].size}
            measured |= self.remove(graph, keep, task)
        return measured | {"trainings": trainings}

    def _companions(self, graph: Graph, task: Task, widths: Mapping[str, int]) -> list[Companion]:
        if self.penalty == "none" or not self.strength:
            return []
        groups = axes(graph)
        chosen = [groups[name] for name in widths]
        scores = self.scores(graph, groups, chosen, task) if self.penalty == "growing" else {}
        doomed = {name: score.sort(stable=True).indices[: len(score) - widths[name]] for name, score in scores.items()}
        return [Fading(f"{self}", self.penalty, self.strength, groups, chosen, doomed)]


class Fading(Companion):
    """The penalty, relative to what it is at the beginning: so its strength says what it adds to the loss, in any network."""

    def __init__(self, key: str, kind: str, strength: float, groups: Groups, chosen: Iterable[Group], doomed: Mapping[str, Tensor]):
        self.key, self.kind, self.strength = key, kind, strength
        self.groups, self.chosen, self.doomed = groups, list(chosen), doomed
        self.factor, self.first = 0.0, math.nan

    def join(self, graph: Graph) -> None:
        self.graph = graph
        norms = {layer.weight for layer in self.groups.layers.values() if layer.kind == "norm"}
        trained = {name for name, parameter in graph.tensors.named_parameters() if parameter.requires_grad}
        used = trained & norms if self.kind == "slimming" else trained
        self.rows = [
            (group.size, [(name, dim, self.groups.places(name, dim, group)) for name, dim in group.members if name in used])
            for group in self.chosen
        ]
        self.marks = [self._mark(group) for group in self.chosen]
        if math.isnan(self.first):
            self.first = max(float(self._penalty().detach()), 1e-12)

    def before(self, step: int, steps: int) -> None:
        self.factor = self.strength * ((step + 1) / steps if self.kind == "growing" else 1.0)

    def term(self) -> Tensor | float:
        return self.factor / self.first * self._penalty()

    def measured(self) -> dict[str, Any]:
        return {"faded": 1 - float(self._penalty().detach()) / self.first}

    def state(self) -> dict[str, Tensor]:
        return {"first": torch.tensor(self.first, dtype=torch.float64)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.first = float(state["first"])

    def _mark(self, group: Group) -> Tensor:
        """The weight of each channel in the penalty [size]."""
        if self.kind != "growing":
            return torch.ones(group.size)
        return torch.zeros(group.size).index_fill(0, self.doomed[group.name].cpu(), 1.0)

    def _penalty(self) -> Tensor:
        device = next(self.graph.parameters()).device
        total = torch.zeros((), device=device)
        for (size, members), mark in zip(self.rows, self.marks, strict=True):
            squares, count = torch.zeros(size, device=device), 0
            for name, dim, places in members:
                weight = self.graph.tensor(name)
                rest = [other for other in range(weight.ndim) if other != dim]
                own = (weight.square().sum(rest) if rest else weight.square()).float()
                inside = (places >= 0).nonzero().flatten()
                squares = squares.index_add(0, places[inside].to(device), own[inside.to(device)])
                count += weight.numel() // size
            if self.kind == "growing":
                total = total + (squares * mark.to(device)).sum()
            elif members:
                total = total + math.sqrt(max(count, 1)) * (squares + 1e-12).sqrt().sum()
        return total
