"""Distillation from the original: the recovery after every step that costs accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..errors import StepError
from ..graph import Graph
from ..graph.layers import QUANTIZERS
from ..step import Plan, Step, option
from ..task import Task, call
from ..train import OPTIMIZER, Augment, Average, Companion, Rate, Training, Unfreeze, losses, recover
from ..train.losses import LIKENESSES
from ..train.teacher import ALPHA, TEMPERATURE


@dataclass(frozen=True)
class Logits(Step):
    """Trains toward the outputs of the original (Hinton, Vinyals & Dean 2015, "Distilling the knowledge in a neural network")."""

    stage = None
    needs: ClassVar[tuple[str, ...]] = ("train",)
    replaceable: ClassVar[bool] = True  # by the same network trained by labels alone

    epochs: float = option(1.0, "passes over the training data; 0.5 is half a pass")
    learning_rate: float | None = option(None, "highest learning rate; found from the graph when not given")
    temperature: float = option(TEMPERATURE, "softens the probabilities of teacher and student; above zero")
    alpha: float = option(ALPHA, "weight of the original's outputs in the loss, 0 to 1; the task's loss has the rest")
    likeness: str = option("soft", "how logits are compared: soft; decoupled (DKD), correlated (DIST), standardized")
    optimizer: str = option("adamw", OPTIMIZER)
    patience: int = option(0, "passes without a better validation score after which training stops, before the rate has fallen; 0: never")
    augment: str | tuple[str, ...] = option((), "what is done to the student's inputs: crop, flip, cutout, mixup, cutmix; tokens")
    average: float = option(0.0, "decay of the mean of past weights, which then is the result, such as 0.999; 0: the weights themselves")
    unfreeze: float = option(0.0, "share of the training in which layers are freed one after another, the last one first; 0: all train")
    baseline: bool = option(False, "train copies alike without the original, and without hidden values; tell the gain, keep the best")
    bits: float | None = option(None, "most entropy of the quantized weights at the end, bits per weight: bounds the size of the file")

    def plan(self, graph: Graph, task: Task) -> Plan:
        if self.temperature <= 0:
            raise StepError(f"The temperature is {self.temperature!r}.", "a number above zero", "4 suits most classifiers")
        if not 0 <= self.alpha <= 1:
            raise StepError(f"alpha is {self.alpha!r}.", "a number from 0 to 1")
        if self.likeness not in LIKENESSES:
            raise StepError(f"There is no likeness {self.likeness!r}.", f"one of {', '.join(LIKENESSES)}")
        if self.alpha == 0 and task.loss is None:
            raise StepError(f"alpha is 0 and the task {task.name!r} has no loss.", "Task(..., loss=...) or an alpha above 0")
        if self.baseline and (task.loss is None or task.validation is None):
            raise StepError("The gain of the original cannot be measured.", "a task with a loss and validation data", "baseline=False")
        if self.baseline and not self.replaceable:
            raise StepError(f"A network trained by labels alone cannot take the place of what {self.name()} trains.", "baseline=False")
        if self.bits is not None and not graph.find(*QUANTIZERS):
            told = f"{self.bits} bits are asked for and no weight is quantized."
            raise StepError(told, "quantized weights", "put quantize.RateDistortion before")
        self._companions()  # which refuse what they cannot be
        how = self._training(graph)
        alpha = self.alpha if task.loss else 1.0
        change = {"epochs": how.epochs, "learning_rate": how.learning_rate, "optimizer": how.optimizer, "bits": self.bits}
        return Plan({"*": change | {"temperature": self.temperature, "alpha": alpha}})

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        return self._learn(graph, plan, task, workdir)

    def _learn(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None, **taught: Any) -> dict[str, Any]:
        """`taught` by other than the outputs of the original: a hint, another teacher."""
        alpha, how = plan.changes["*"]["alpha"], self._training(graph)
        taught = {"alike": partial(losses.imitation, temperature=self.temperature, likeness=self.likeness)} | taught
        begin = graph.copy() if self.baseline else graph
        measured = recover(graph, task, how, workdir, self._companions(), alpha=alpha, **taught)
        if not self.baseline:
            return measured
        less: dict[str, dict[str, Any]] = {"alone": {"alpha": 0.0}}
        if taught.get("hint"):
            less["outputs"] = taught | {"alpha": alpha, "hint": None}
        rivals = {"all": graph}
        for name, terms in less.items():
            rivals[name] = begin.copy()
            rivals[name].tap()
            recover(rivals[name], task, how, workdir and workdir / name, self._companions(), **terms)
        scores = {name: float(np.mean(task.score(partial(call, one)))) for name, one in rivals.items()}
        sign = 1 if task.higher_is_better else -1
        best = max(scores, key=lambda name: sign * scores[name])  # the first of equals: with all terms
        for name, value in rivals[best].named_tensors() if best != "all" else ():
            graph.set_tensor(name, value)
        gains = {"gain": sign * (scores["all"] - scores["alone"]), "taught": best != "alone", "kept_terms": best}
        return measured | {name: scores[name] for name in less} | gains

    def _companions(self) -> list[Companion]:
        names = (self.augment,) if isinstance(self.augment, str) else self.augment
        found: list[Companion] = [Augment(names)] if names else []
        found += [Average(self.average)] if self.average else []
        found += [Unfreeze(self.unfreeze)] if self.unfreeze else []
        return found + ([] if self.bits is None else [Rate(self.bits)])

    def _training(self, graph: Graph) -> Training:
        return Training.of(graph, self.learning_rate, self.optimizer, epochs=self.epochs, patience=self.patience)
