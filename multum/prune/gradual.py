"""Gradual pruning: weights become zero little by little while the others learn to do without them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..analyze.evidence import Evidence
from ..errors import StepError, TrainError, near
from ..graph import Graph, Layer, layers
from ..graph.sparse import sparsify
from ..step import Plan, Stage, Step, option
from ..task import Task
from ..train import OPTIMIZER, Companion, Training, recover
from .criteria import CRITERIA
from .masks import maskable

MOVEMENT = "movement"
_CRITERIA = ("lamp", "l1", "l2", "random", MOVEMENT)
_CURVES = ("polynomial", "cosine")
_UPDATES = 100  # of the zeros on the way from begin to end, when it is not said how often


@dataclass(frozen=True)
class Gradual(Step):
    """Sets more and more weights to zero during a training toward the original, by a schedule (automated gradual
    pruning; Zhu & Gupta 2017, section 3).

    A weight that became zero may come back: by its score when the criterion is `movement`, which is the sum of the steps that the
    training makes, or would make, away from zero (Sanh, Wolf & Rush 2020, section 3), and for its gradient with `regrow`
    (Evci et al. 2020, section 3).
    """

    stage: ClassVar[Stage | None] = Stage.VALUES
    needs: ClassVar[tuple[str, ...]] = ("train",)

    ratio: float = option(0.9, "share of the weights that is zero in the end")
    criterion: str = option("lamp", f"what a weight is judged by: {', '.join(_CRITERIA)}")
    allocation: str = option("global", "global: the lowest scores of the whole network; uniform: the same share of every layer")
    curve: str = option("polynomial", "how the share of zeros grows: polynomial or cosine")
    power: float = option(3.0, "of the polynomial: 1 is a straight line, 3 takes most at the beginning")
    begin: float = option(0.0, "share of the training after which the first weights become zero")
    end: float = option(0.7, "share of the training after which the last have")
    every: int = option(0, "steps between two changes of the zeros; 0: a hundredth of the way from begin to end")
    regrow: float = option(0.0, "share of the other weights that changes places with zeros of large gradient, each time; falls to 0")
    epochs: float = option(2.0, "passes over the training data")
    learning_rate: float | None = option(None, "highest learning rate; found from the graph when not given")
    optimizer: str = option("adamw", OPTIMIZER)
    floor: float = option(0.01, "least share of each layer that is kept")
    include: str | tuple[str, ...] = option("*", "glob patterns of layers")
    exclude: str | tuple[str, ...] = option((), "glob patterns of layers to leave whole")

    def __post_init__(self) -> None:
        Training(optimizer=self.optimizer)  # which refuses what it does not know
        if self.criterion not in _CRITERIA:
            raise StepError(f"There is no criterion {self.criterion!r}.", f"one of the criteria, such as {near(self.criterion, _CRITERIA)}")
        if self.allocation not in ("global", "uniform"):
            raise StepError(f"The allocation is {self.allocation!r}.", "global or uniform")
        if self.curve not in _CURVES:
            raise StepError(f"The curve is {self.curve!r}.", " or ".join(_CURVES))
        if not 0 < self.ratio < 1:
            raise StepError(f"The share of weights to set to zero is {self.ratio}.", "a ratio between 0 and 1, such as 0.9")
        if not 0 <= self.begin < self.end <= 1:
            raise StepError(f"The zeros come from {self.begin} to {self.end} of the training.", "0 <= begin < end <= 1")
        if self.power <= 0 or self.every < 0:
            raise StepError(f"The power is {self.power}, the steps between two changes {self.every}.", "a power above 0, and steps from 0")
        for name in ("regrow", "floor"):
            if not 0 <= getattr(self, name) < 1:
                raise StepError(f"{name} is {getattr(self, name)}.", "a share from 0 to below 1")

    def plan(self, graph: Graph, task: Task) -> Plan:
        chosen, skipped = maskable(graph, self.include, self.exclude)
        changes, own = {}, self.allocation == "uniform"
        for layer in chosen:
            weight = graph.tensor(layer.weight)
            if weight.requires_grad:
                changes[layer.name] = {"of": weight.numel(), "criterion": self.criterion} | ({"ratio": self.ratio} if own else {})
            else:
                skipped[layer.name] = "its weight does not train"
        return Plan(changes, skipped)

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        known = {layer.name: layer for layer in layers(graph)}
        thinning = Thinning(self, Evidence(graph, task), {name: known[name] for name in plan.changes})
        how = Training.of(graph, self.learning_rate, self.optimizer, epochs=self.epochs)
        measured = recover(graph, task, how, workdir, [thinning])
        for name in plan.changes:
            weight = graph.tensor(known[name].weight)
            sparsify(graph, known[name].weight, weight.detach() == 0)
        return measured

    def share(self, progress: float, start: float = 0.0) -> float:
        """The share of zeros after a share of the training, when it was `start` before."""
        way = min(max((progress - self.begin) / (self.end - self.begin), 0.0), 1.0)
        way = (1 - math.cos(math.pi * way)) / 2 if self.curve == "cosine" else 1 - (1 - way) ** self.power
        return start + (self.ratio - start) * way


class Thinning(Companion):
    """Carries out the schedule of `how` on these layers, during a training."""

    def __init__(self, how: Gradual, evidence: Evidence, chosen: Mapping[str, Layer]):
        self.how, self.evidence, self.chosen, self.key = how, evidence, chosen, str(how)
        self.now = 0.0  # share of the training that is over

    def join(self, graph: Graph) -> None:
        self.evidence.device = next(graph.parameters()).device
        self.weights = {name: graph.tensor(layer.weight) for name, layer in self.chosen.items()}
        kept = graph.sparse  # zeros that were there on purpose stay, whatever their score
        self.fixed = {name: (w == 0) & (self.chosen[name].weight in kept) for name, w in self.weights.items()}
        self.zeros = {name: fixed.clone() for name, fixed in self.fixed.items()}
        self.scores = {name: torch.zeros_like(w.detach()) for name, w in self.weights.items()} if self.how.criterion == MOVEMENT else {}
        self.asleep = {name: w.detach().clone() for name, w in self.weights.items()} if self.scores else {}
        self.start = self._zero_share()

    def after(self, step: int, steps: int) -> None:
        self.now = (step + 1) / steps
        for name, score in self.scores.items():
            score -= self._gradient(name) * torch.where(self.zeros[name], self.asleep[name], self.weights[name])
        every = self.how.every or max(1, round((self.how.end - self.how.begin) * steps / _UPDATES))
        last = step + 1 >= self.how.end * steps > step
        if self.how.begin <= self.now and (last or (self.now < self.how.end and step % every == 0)):
            self._choose()
        for name, weight in self.weights.items():
            weight.masked_fill_(self.zeros[name], 0)

    def met(self) -> bool:
        return self.now >= self.how.end

    def measured(self) -> dict[str, Any]:
        return {"zeros": self._zero_share(), "layers": {name: round(float(zero.float().mean()), 4) for name, zero in self.zeros.items()}}

    def state(self) -> dict[str, Tensor]:
        rows = {"zeros": self.zeros, "scores": self.scores, "asleep": self.asleep, "fixed": self.fixed}
        found = {f"{kind}.{name}": value for kind, values in rows.items() for name, value in values.items()}
        return found | {"now": torch.tensor([self.now, self.start], dtype=torch.float64)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.now, self.start = state["now"].tolist()
        for kind in ("zeros", "scores", "asleep", "fixed"):
            for name, value in getattr(self, kind).items():
                value.copy_(state[f"{kind}.{name}"])

    def _choose(self) -> None:
        """Which weights are zero from now on."""
        share = self.how.share(self.now, self.start)
        scores = {name: self._score(name) for name in self.chosen}
        for name, fixed in self.fixed.items():
            scores[name] = scores[name].masked_fill(fixed, -math.inf)
        if self.how.allocation == "global":
            pooled = torch.cat([score.flatten() for score in scores.values()])
            bound = pooled.kthvalue(max(1, round(share * len(pooled)))).values
        for name, score in scores.items():
            wanted = int((score <= bound).sum()) if self.how.allocation == "global" else round(share * score.numel())
            count = min(wanted, score.numel() - max(1, math.ceil(self.how.floor * score.numel())))
            zero = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
            zero[score.flatten().sort(stable=True).indices[:count]] = True
            zero = self._regrown(name, zero.reshape(score.shape), score)
            weight, before = self.weights[name], self.zeros[name]
            if name in self.asleep:
                self.asleep[name] = torch.where(before, self.asleep[name], weight.detach())
                weight.copy_(torch.where(before & ~zero, self.asleep[name], weight))
            self.zeros[name] = zero

    def _score(self, name: str) -> Tensor:
        if self.scores:
            return self.scores[name]
        return CRITERIA[self.how.criterion](self.evidence, self.chosen[name])

    def _regrown(self, name: str, zero: Tensor, score: Tensor) -> Tensor:
        """Some of the other weights change places with as many zeros, those that the loss pulls at most."""
        count = int(self.how.regrow * (1 - self.now / self.how.end) * float((~zero).sum())) if self.how.regrow else 0
        if count <= 0:
            return zero
        pulled = self._gradient(name).abs().masked_fill(~zero | self.fixed[name], -1.0)
        back = pulled.flatten().topk(count).indices
        back = back[pulled.flatten()[back] > 0]
        gone = score.masked_fill(zero, math.inf).flatten().topk(len(back), largest=False).indices
        flat = zero.flatten().clone()
        flat[gone], flat[back] = True, False
        return flat.reshape(zero.shape)

    def _gradient(self, name: str) -> Tensor:
        gradient = self.weights[name].grad
        if gradient is None:
            raise TrainError(
                f"The weight of {name} has no gradient after a step of the training.",
                "gradients, for movement and regrow",
                "leave the task's `fit` out, or take the criterion lamp",
            )
        return gradient

    def _zero_share(self) -> float:
        return sum(float(zero.sum()) for zero in self.zeros.values()) / max(1, sum(zero.numel() for zero in self.zeros.values()))
