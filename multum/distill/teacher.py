"""The original as a teacher, and the training toward it that other methods recover with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..graph import Graph
from ..graph.fuse import fuse
from ..graph.model import aten
from ..task import Task, call, tensors
from ..train import Companion, Training, arrange, fit, lay_out
from .losses import imitation

TEMPERATURE, ALPHA = 4.0, 0.9


class Teacher:
    """A copy of the original, fused, on the device and in the layout of the inputs it is asked with. Keeps no gradients."""

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


def recover(
    graph: Graph,
    task: Task,
    how: Training,
    workdir: Path | None = None,
    companions: Sequence[Companion] = (),
    temperature: float = TEMPERATURE,
    alpha: float = ALPHA,
) -> dict[str, Any]:
    """Trains `graph` in place toward the outputs of the original; the task's loss, where there is one, weighs 1 - `alpha`."""
    teacher, own = Teacher(task.original), task.loss
    alpha = 1.0 if own is None else alpha

    def loss(inputs: Any, outputs: Any, targets: Any) -> Tensor:
        total = alpha * imitation(outputs, teacher(inputs), targets, temperature) if alpha > 0 else torch.zeros(())
        return total + (1 - alpha) * own(outputs, targets) if own and alpha < 1 else total

    return fit(graph, task, loss, how, workdir, companions)


def default_rate(graph: Graph, optimizer: str) -> float:
    """A learning rate for a trained network that has lost something.

    Batch normalization makes the outputs independent of the scale of the weights, so that large steps do no harm.
    Without it, in transformers and where it was folded before quantization, they destroy what is there.
    """
    rate = 1e-3 if graph.find(aten.batch_norm.default) else 1e-4
    return rate * 10 if optimizer == "sgd" else rate
