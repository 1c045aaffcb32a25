"""Distillation of what lies inside: hidden values, where attention goes, how samples relate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import StepError, near
from ..graph import Graph
from ..graph.model import aten
from ..step import Plan, option
from ..task import Task
from ..train import losses
from .logits import Logits
from .places import Pair, is_signal, pairs

Compare = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Inside(Logits):
    """What the steps share that add terms over pairs of hidden values to the loss of `Logits`."""

    weight: float = option(1.0, "of the mean of the terms, beside the loss toward outputs and labels")
    layers: str | tuple[str, ...] = option((), "glob patterns of layers, or 'layer of the student=layer of the teacher'; found when none")

    def pairs(self, graph: Graph, teacher: Graph) -> list[Pair]:
        return pairs(graph, teacher, (self.layers,) if isinstance(self.layers, str) else self.layers)

    def compare(self, graph: Graph) -> Compare:
        raise NotImplementedError

    def plan(self, graph: Graph, task: Task) -> Plan:
        if not 0 < self.weight < float("inf"):
            raise StepError(f"The weight is {self.weight!r}.", "a number above zero")
        changes = super().plan(graph, task).changes
        found = [[student.name, teacher.name] for student, teacher in self.pairs(graph, task.original)]
        return Plan({"*": changes["*"] | {"pairs": found, "weight": self.weight}})

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        found, compare = self.pairs(graph, task.original), self.compare(graph)
        wider = [is_signal(student) for student, _ in found]  # which the losses take for images of width one

        def hint(ours: list[Any], theirs: list[Any]) -> Tensor:
            rows = zip(ours, theirs, wider, strict=True)
            terms = [compare(a[..., None], b.detach()[..., None]) if wide else compare(a, b.detach()) for a, b, wide in rows]
            return self.weight / len(terms) * sum(terms[1:], terms[0])

        graph.tap([student for student, _ in found])
        try:
            return self._learn(graph, plan, task, workdir, hint=(hint, [teacher for _, teacher in found]))
        finally:
            graph.tap()


@dataclass(frozen=True)
class Hidden(Inside):
    """Trains toward hidden values of the original as well (Romero et al. 2015; Sun et al. 2019; Zagoruyko & Komodakis 2017).

    `projected`: values of any width, up to the best linear map; `patient`: of the same width, normalized; `attention`: where in an image
    or a signal the energy lies. Several are summed, those of `Relations` among them.
    """

    loss: str | tuple[str, ...] = option("projected", "projected, patient or attention; several with weights: ('projected', 'rkd=0.1')")

    def compare(self, graph: Graph) -> Compare:
        return _weighted(self.loss, _HIDDEN | _RELATIONS)


@dataclass(frozen=True)
class Relations(Inside):
    """Trains toward how samples of a batch relate in the original (Park et al. 2019; Tung & Mori 2019; Tian et al. 2020)."""

    loss: str | tuple[str, ...] = option("rkd", "rkd: distances and angles; similarity; contrast; several: ('rkd', 'contrast=0.1')")

    def compare(self, graph: Graph) -> Compare:
        return _weighted(self.loss, _RELATIONS)

    def pairs(self, graph: Graph, teacher: Graph) -> list[Pair]:
        return super().pairs(graph, teacher)[-1:] if not self.layers else super().pairs(graph, teacher)


@dataclass(frozen=True)
class Attention(Inside):
    """Trains toward how the positions of a sequence relate in the original: queries, keys and values (Wang et al. 2021, MiniLMv2).

    Taken where attention is computed, in the last such place of each, or evenly spread over `depth` of them.
    """

    depth: int = option(1, "how many attentions are imitated, from the last one on")
    heads: int = option(0, "into which widths are split; 0: those of the student")

    def pairs(self, graph: Graph, teacher: Graph) -> list[Pair]:
        ours, theirs = (_attentions(one) for one in (graph, teacher))
        if not ours or not theirs:
            raise StepError("There is no attention in the graph.", "scaled dot-product attention in student and teacher", "distill.Hidden")
        count = max(1, min(self.depth, len(ours), len(theirs)))
        mine, others = (nodes[-count:] for nodes in (ours, theirs))
        return [(a, b) for one, other in zip(mine, others, strict=True) for a, b in zip(one, other, strict=True)]

    def compare(self, graph: Graph) -> Compare:
        return lambda ours, theirs: losses.self_relations(_joined(ours), _joined(theirs), self.heads or ours.shape[1])


_HIDDEN: dict[str, Compare] = {"projected": losses.projected, "patient": losses.patient, "attention": losses.attention}
_RELATIONS: dict[str, Compare] = {
    "rkd": lambda ours, theirs: losses.distances(ours, theirs) + 2 * losses.angles(ours, theirs),
    "similarity": losses.similarities,
    "contrast": losses.contrast,
}


def _weighted(given: str | tuple[str, ...], known: dict[str, Compare]) -> Compare:
    """The sum of the losses of these names, each times its weight where it has one."""
    rows = weights((given,) if isinstance(given, str) else given)
    for name in rows:
        if name not in known:
            raise StepError(f"There is no loss {name!r}.", f"one of {', '.join(known)}, such as {near(name, known)}")
    if not any(rows.values()):
        raise StepError(f"No loss has a weight: {given!r}.", "at least one above 0")
    return lambda ours, theirs: sum((weight * known[name](ours, theirs) for name, weight in rows.items()), start=torch.zeros(()))


def weights(rows: Sequence[str]) -> dict[str, float]:
    """Weights by name, from 'name=weight' or 'name', which weighs 1. Raises StepError for what is no number from 0 on."""
    found = {}
    for row in rows:
        name, _, weight = row.partition("=")
        try:
            found[name] = float(weight or 1)
        except ValueError:
            found[name] = -1.0
        if not 0 <= found[name] < float("inf"):
            raise StepError(f"{row!r} gives no weight.", "a name and a number from 0 on, such as 'rkd=0.5'")
    return found


def _attentions(graph: Graph) -> list[list[fx.Node]]:
    """Queries, keys and values [n, heads, positions, width] of each attention, in order of execution."""
    return [[node for node in call.args[:3] if isinstance(node, fx.Node)] for call in graph.find(aten.scaled_dot_product_attention.default)]


def _joined(value: Tensor) -> Tensor:
    return value.transpose(1, 2).flatten(2)
