"""Distillation without data: the inputs are made from what the teacher remembers of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..errors import StepError
from ..graph import Graph
from ..graph.model import aten, read
from ..step import Plan, option
from ..task import Task, logits
from ..train import Training
from ..train.augment import cutmix
from .logits import Logits

_SHIFT = 2  # pixels by which images move between steps, so that no place in them is special
_CLOSE = 1e-4


@dataclass(frozen=True)
class DataFree(Logits):
    """Trains toward the original on inputs that are made from it, no datum used (Yin et al. 2020, DeepInversion, section 3.2).

    Noise is moved by gradient descent until the original sees the class that was drawn, and until means and variances before each batch
    normalization are those that it keeps. Networks without batch normalization have only the first, and teach less. In each pass boxes
    of the inputs are filled from others, and the original is asked what it sees then: no input is seen twice. Validation data are not
    looked at.
    """

    needs: ClassVar[tuple[str, ...]] = ()

    alpha: float = option(1.0, "1: there are no labels")
    samples: int = option(1024, "inputs that are made")
    batch: int = option(128, "inputs that are made together; their statistics are compared")
    descent: int = option(400, "steps of gradient descent for each batch")
    rate: float = option(0.05, "learning rate of the inputs, which begin as noise of deviation 1")
    statistics: float = option(100.0, "weight of the statistics, beside the classes'")
    smooth: float = option(0.01, "weight of the differences between neighbours in images and signals")

    def plan(self, graph: Graph, task: Task) -> Plan:
        for name in ("samples", "batch", "descent", "rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise StepError(f"{name} is {getattr(self, name)!r}.", "a number above zero")
        _input(task.original)
        changes = super().plan(graph, task.but(loss=None)).changes["*"]
        norms = len(task.original.find(aten.batch_norm.default))
        return Plan({"*": changes | {"samples": self.samples, "descent": self.descent, "batch_norms": norms}})

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        device = next(graph.parameters()).device
        inputs, told = self.inverted(task.original, task.seed, device)
        made = task.but(train=_Mixed(inputs, self.batch), validation=None, loss=None, fit=None)
        return self._learn(graph, plan, made, workdir) | told

    def _training(self, graph: Graph) -> Training:
        return replace(super()._training(graph), memory=0.0)  # no input comes twice

    def inverted(self, original: Graph, seed: int, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
        """The inputs [samples, ...], and how well the original takes them for the classes that were drawn."""
        teacher = original.copy().eval().requires_grad_(False).to(device)
        norms = teacher.find(aten.batch_norm.default)
        kept = [tuple(teacher.tensor(str(read(node, name).target)) for name in ("running_mean", "running_var")) for node in norms]
        teacher.tap([node.all_input_nodes[0] for node in norms])
        made, hits, off = list[Tensor](), list[float](), list[float]()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for first in range(0, self.samples, self.batch):
                size = min(self.batch, self.samples - first)
                x = torch.randn(size, *_input(original).shape[1:], device=device)
                answer = logits(teacher(x))
                classes = torch.randint(answer.shape[-1], (size,), device=device) if answer.ndim == 2 else None
                x, apart = self._descend(teacher, x, classes, kept)
                off.append(apart)
                if classes is not None:
                    with torch.no_grad():
                        hits.append(float((logits(teacher(x)).argmax(1) == classes).float().mean()))
                made.append(x)
        told = {"statistics_off": sum(off) / len(off)} | ({"seen_as_drawn": sum(hits) / len(hits)} if hits else {})
        return torch.cat(made), told

    def _descend(self, teacher: Graph, x: Tensor, classes: Tensor | None, kept: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, float]:
        x = x.requires_grad_(True)
        optimizer = torch.optim.Adam([x], self.rate, betas=(0.5, 0.9))
        apart = torch.zeros((), device=x.device)
        for step in range(self.descent):
            optimizer.param_groups[0]["lr"] = self.rate * (1 - step / self.descent)
            moved = x.roll(torch.randint(-_SHIFT, _SHIFT + 1, (x.ndim - 2,)).tolist(), tuple(range(2, x.ndim))) if x.ndim > 2 else x
            answer = logits(teacher(moved))
            apart = _apart(teacher.tapped, kept, x)
            loss = self.statistics * apart + self.smooth * _rough(moved)
            if classes is not None:
                loss = loss + F.cross_entropy(answer, classes)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return x.detach(), float(apart.detach())


class _Mixed:
    """Batches in another order each time, with boxes of their inputs [n, c, h, w] filled from each other; others are as they were made."""

    def __init__(self, inputs: Tensor, size: int):
        self.inputs, self.size = inputs, size

    def __len__(self) -> int:
        return -(-len(self.inputs) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, None]]:
        for rows in torch.split(torch.randperm(len(self.inputs)), self.size):
            x = self.inputs[rows]
            yield (cutmix(x)[0] if x.ndim == 4 else x), None


def _input(graph: Graph) -> Tensor:
    """The example of the one input, whose values can be moved. Raises StepError when the inputs are others."""
    nodes: list[fx.Node] = [node for node in graph.fx.nodes if node.op == "placeholder"]
    value = nodes[0].meta["val"] if len(nodes) == 1 else None
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 2:
        raise StepError("The inputs are not one tensor of numbers.", "images, signals or features [n, ...]", "distill.Unlabelled")
    return value


def _apart(values: Sequence[Tensor], kept: Sequence[tuple[Tensor, ...]], like: Tensor) -> Tensor:
    """How far statistics are from those that are kept, in deviations, its mean square over channels and norms."""
    total = torch.zeros((), device=like.device)
    for value, (mean, variance) in zip(values, kept, strict=True):
        others = [dim for dim in range(value.ndim) if dim != 1]
        spread, centre = torch.var_mean(value, others, correction=0)
        deviation = (variance + _CLOSE).sqrt()
        total = total + ((centre - mean) / deviation).square().mean() + ((spread + _CLOSE).sqrt() / deviation - 1).square().mean()
    return total / max(1, len(kept))


def _rough(x: Tensor) -> Tensor:
    """The mean square difference of neighbours, along every dimension behind the channels."""
    parts = [x.diff(dim=dim).square().mean() for dim in range(2, x.ndim)]
    return sum(parts, start=torch.zeros((), device=x.device))
