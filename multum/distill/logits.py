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
from ..train import Augment, Average, Companion, Rate, Training, default_rate, recover
from ..train.teacher import ALPHA, TEMPERATURE


@dataclass(frozen=True)
class Logits(Step):
    """Trains toward the outputs of the original (Hinton, Vinyals & Dean 2015, "Distilling the knowledge in a neural network")."""

    stage = None
    needs: ClassVar[tuple[str, ...]] = ("train",)

    epochs: float = option(1.0, "passes over the training data; 0.5 is half a pass")
    learning_rate: float | None = option(None, "highest learning rate; found from the graph when not given")
    temperature: float = option(TEMPERATURE, "softens the probabilities of teacher and student; above zero")
    alpha: float = option(ALPHA, "weight of the original's outputs in the loss, 0 to 1; the task's loss has the rest")
    optimizer: str = option("adamw", "adamw or sgd")
    patience: int = option(5, "passes without a better validation score after which training stops; 0: never")
    augment: str | tuple[str, ...] = option((), "what is done to the student's inputs: crop, flip, cutout, mixup, cutmix; tokens")
    average: float = option(0.0, "decay of the mean of past weights, which then is the result, such as 0.999; 0: the weights themselves")
    baseline: bool = option(False, "train a copy alike without the original as well, tell what it gained, and keep the better of the two")
    bits: float | None = option(None, "most entropy of the quantized weights at the end, bits per weight: bounds the size of the file")

    def plan(self, graph: Graph, task: Task) -> Plan:
        if self.temperature <= 0:
            raise StepError(f"The temperature is {self.temperature!r}.", "a number above zero", "4 suits most classifiers")
        if not 0 <= self.alpha <= 1:
            raise StepError(f"alpha is {self.alpha!r}.", "a number from 0 to 1")
        if self.alpha == 0 and task.loss is None:
            raise StepError(f"alpha is 0 and the task {task.name!r} has no loss.", "Task(..., loss=...) or an alpha above 0")
        if self.baseline and (task.loss is None or task.validation is None):
            raise StepError("The gain of the original cannot be measured.", "a task with a loss and validation data", "baseline=False")
        if self.bits is not None and not graph.find(*QUANTIZERS):
            raise StepError(
                f"{self.bits} bits are asked for and no weight is quantized.", "quantized weights", "put quantize.RateDistortion before"
            )
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
        alone = graph.copy() if self.baseline else None
        measured = recover(graph, task, how, workdir, self._companions(), self.temperature, alpha, **taught)
        if alone is None:
            return measured
        recover(alone, task, how, workdir and workdir / "alone", self._companions(), alpha=0.0)
        ours, theirs = (float(np.mean(task.score(partial(call, one)))) for one in (graph, alone))
        gain = ours - theirs if task.higher_is_better else theirs - ours
        if gain < 0:
            for name, value in alone.named_tensors():
                graph.set_tensor(name, value)
        return measured | {"alone": theirs, "gain": gain, "taught": gain >= 0}

    def _companions(self) -> list[Companion]:
        names = (self.augment,) if isinstance(self.augment, str) else self.augment
        found: list[Companion] = [Augment(names)] if names else []
        found += [Average(self.average)] if self.average else []
        return found + ([] if self.bits is None else [Rate(self.bits)])

    def _training(self, graph: Graph) -> Training:
        rate = default_rate(graph, self.optimizer) if self.learning_rate is None else self.learning_rate
        return Training(epochs=self.epochs, learning_rate=rate, optimizer=self.optimizer, patience=self.patience)
