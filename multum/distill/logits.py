"""Distillation from the original: the recovery after every step that costs accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import StepError
from ..graph import Graph
from ..graph.layers import QUANTIZERS
from ..step import Plan, Step, option
from ..task import Task
from ..train import Rate, Training, default_rate, recover
from ..train.teacher import ALPHA, TEMPERATURE, Hint


@dataclass(frozen=True)
class Logits(Step):
    """Trains toward the outputs of the original (Hinton, Vinyals & Dean 2015, "Distilling the knowledge in a neural network")."""

    stage = None
    needs = ("train",)

    epochs: float = option(1.0, "passes over the training data; 0.5 is half a pass")
    learning_rate: float | None = option(None, "highest learning rate; found from the graph when not given")
    temperature: float = option(TEMPERATURE, "softens the probabilities of teacher and student; above zero")
    alpha: float = option(ALPHA, "weight of the original's outputs in the loss, 0 to 1; the task's loss has the rest")
    optimizer: str = option("adamw", "adamw or sgd")
    patience: int = option(5, "passes without a better validation score after which training stops; 0: never")
    bits: float | None = option(None, "most entropy of the quantized weights at the end, bits per weight: bounds the size of the file")

    def plan(self, graph: Graph, task: Task) -> Plan:
        if self.temperature <= 0:
            raise StepError(f"The temperature is {self.temperature!r}.", "a number above zero", "4 suits most classifiers")
        if not 0 <= self.alpha <= 1:
            raise StepError(f"alpha is {self.alpha!r}.", "a number from 0 to 1")
        if self.alpha == 0 and task.loss is None:
            raise StepError(f"alpha is 0 and the task {task.name!r} has no loss.", "Task(..., loss=...) or an alpha above 0")
        if self.bits is not None and not graph.find(*QUANTIZERS):
            raise StepError(
                f"{self.bits} bits are asked for and no weight is quantized.", "quantized weights", "put quantize.RateDistortion before"
            )
        how = self._training(graph)
        alpha = self.alpha if task.loss else 1.0
        change = {"epochs": how.epochs, "learning_rate": how.learning_rate, "optimizer": how.optimizer, "bits": self.bits}
        return Plan({"*": change | {"temperature": self.temperature, "alpha": alpha}})

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        return self._learn(graph, plan, task, workdir)

    def _learn(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None, hint: Hint | None = None) -> dict[str, Any]:
        alpha, companions = plan.changes["*"]["alpha"], [] if self.bits is None else [Rate(self.bits)]
        return recover(graph, task, self._training(graph), workdir, companions, self.temperature, alpha, hint)

    def _training(self, graph: Graph) -> Training:
        rate = default_rate(graph, self.optimizer) if self.learning_rate is None else self.learning_rate
        return Training(epochs=self.epochs, learning_rate=rate, optimizer=self.optimizer, patience=self.patience)
