"""Distillation from the original: the recovery after every step that costs accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import StepError
from ..graph import Graph
from ..graph.fuse import fuse
from ..graph.layers import QUANTIZERS
from ..graph.model import aten
from ..step import Plan, Step, option
from ..task import Task, call, tensors
from ..train import Training, arrange, fit, lay_out
from .losses import imitation


@dataclass(frozen=True)
class Logits(Step):
    """Trains toward the outputs of the original (Hinton, Vinyals & Dean 2015, "Distilling the knowledge in a neural network")."""

    stage = None
    needs = ("train",)

    epochs: float = option(1.0, "passes over the training data; 0.5 is half a pass")
    learning_rate: float | None = option(None, "highest learning rate; found from the graph when not given")
    temperature: float = option(4.0, "softens the probabilities of teacher and student; above zero")
    alpha: float = option(0.9, "weight of the original's outputs in the loss, 0 to 1; the task's loss has the rest")
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
        change = {"epochs": how.epochs, "learning_rate": how.learning_rate, "optimizer": how.optimizer, "bits": how.bits}
        return Plan({"*": change | {"temperature": self.temperature, "alpha": alpha}})

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        alpha = plan.changes["*"]["alpha"]
        teacher = _Teacher(task.original)

        def loss(inputs: Any, outputs: Any, targets: Any) -> Tensor:
            total = alpha * imitation(outputs, teacher(inputs), targets, self.temperature) if alpha > 0 else torch.zeros(())
            return total + (1 - alpha) * task.loss(outputs, targets) if alpha < 1 and task.loss else total

        return fit(graph, task, loss, self._training(graph), workdir)

    def _training(self, graph: Graph) -> Training:
        rate = default_rate(graph, self.optimizer) if self.learning_rate is None else self.learning_rate
        return Training(epochs=self.epochs, learning_rate=rate, optimizer=self.optimizer, patience=self.patience, bits=self.bits)


def default_rate(graph: Graph, optimizer: str) -> float:
    """A learning rate for a trained network that has lost something.

    Batch normalization makes the outputs independent of the scale of the weights, so that large steps do no harm.
    Without it, in transformers and where it was folded before quantization, they destroy what is there.
    """
    rate = 1e-3 if graph.find(aten.batch_norm.default) else 1e-4
    return rate * 10 if optimizer == "sgd" else rate


class _Teacher:
    """The original, fused, on the device and in the layout of the inputs it is asked with. Keeps no gradients."""

    def __init__(self, original: Graph):
        self.graph = original.copy()
        fuse(self.graph)
        self.format = lay_out(self.graph)
        self.device = torch.device("cpu")

    @torch.no_grad()
    def __call__(self, inputs: Any) -> Any:
        device = next(tensors(inputs)).device
        if device != self.device:
            self.graph.to(device)
            self.device = device
        return call(self.graph, arrange(inputs, device, self.format))
