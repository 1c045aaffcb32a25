"""The original as a teacher, and the training toward it that other methods recover with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import TrainError
from ..graph import Graph, spec
from ..graph.fuse import fuse
from ..task import Task, call, tensors, total
from .augment import Augment, Mix, mixed
from .board import note
from .companion import Companion
from .layout import arrange, lay_out
from .loop import Loss, fit
from .losses import imitation
from .memory import Memory, picked
from .optimizer import Training

TEMPERATURE, ALPHA = 4.0, 0.9


# From the student's and the teacher's hidden values, in the same order, to a term of the loss; and the operators that give the teacher's.
Hint = tuple[Callable[[list[Any], list[Any]], Tensor], Sequence[fx.Node]]

# From what the student saw, its outputs, the targets, and the loss to which other outputs for this batch are held, to one more term.
Also = Callable[[Any, Any, Any, Callable[[Any], Tensor]], Tensor]


class Teacher:
    """A copy of the original, on the device and in the layout of the inputs it is asked with. Keeps no gradients.

    Fused, unless that would lose one of the operators `seen`, whose results are in `hidden` after a call. Answers that it gave before
    come out of a memory of so many bytes. A network in training mode is asked as it is for use: its statistics stay.
    """

    def __init__(self, original: Graph, seen: Sequence[fx.Node] = (), memory: float = 0.0):
        self.graph, self.memory, self.hidden = original.copy().eval(), Memory(memory), list[Any]()
        self.taps = len(seen)
        fuse(self.graph)
        if seen:
            names = [node.name for node in seen]
            if not set(names) <= {node.name for node in self.graph.fx.nodes}:
                self.graph = original.copy().eval()
            known = {node.name: node for node in self.graph.fx.nodes}
            self.graph.tap([known[name] for name in names])
        self.format = lay_out(self.graph)
        self.device = torch.device("cpu")

    @torch.no_grad()
    def __call__(self, inputs: Any, targets: Any = None) -> Any:
        device = next(tensors(inputs)).device
        if device != self.device:
            self.graph.to(device)
            self.device = device
        leaves = self.memory(inputs, self._ask)
        own = len(leaves) - self.taps
        self.hidden = leaves[own:]
        return spec.unflatten(leaves[:own], self.graph.outputs)

    def _ask(self, inputs: Any) -> list[Tensor]:
        outputs = call(self.graph, arrange(inputs, self.device, self.format))
        return [*spec.flatten(outputs, self.graph.outputs), *self.graph.tapped]


def recover(
    graph: Graph,
    task: Task,
    how: Training,
    workdir: Path | None = None,
    companions: Sequence[Companion] = (),
    temperature: float = TEMPERATURE,
    alpha: float = ALPHA,
    hint: Hint | None = None,
    teacher: Callable[[Any, Any], Any] | None = None,
    also: Also | None = None,
    alike: Loss | None = None,
) -> dict[str, Any]:
    """Trains `graph` in place toward the outputs of the original; the task's loss, where there is one, weighs 1 - `alpha`.

    With a `hint` the graph is tapped at as many places, and the term over what it gives there is added. Another `teacher` gives the
    outputs for a batch of inputs and targets in the original's place. What `also` gives is added. `alike` takes the place of
    `losses.imitation`: from the student's outputs, the teacher's and the targets to a number.
    """
    asked: Any = teacher or Teacher(task.original, hint[1] if hint else (), how.remembered())
    own = task.loss
    alpha = 1.0 if own is None else alpha

    augment = next((companion for companion in companions if isinstance(companion, Augment)), None)
    if augment and hint:
        raise TrainError("Hidden values of changed inputs do not answer to the teacher's.", "no augmentation, or only toward outputs")

    like = alike or partial(imitation, temperature=temperature)

    def held(outputs: Any, given: Any, targets: Any, mix: Mix | None) -> dict[str, Tensor]:
        terms = {"teacher": alpha * like(outputs, given, targets)} if alpha > 0 else {}
        if own and alpha < 1:
            terms["task"] = (1 - alpha) * total(own(outputs, targets))
            if mix:
                terms["task"] = mix[1] * terms["task"] + (1 - mix[1]) * (1 - alpha) * total(own(outputs, picked(targets, mix[0])))
        return terms

    def loss(inputs: Any, outputs: Any, targets: Any) -> Tensor:
        mix = augment.mix if augment else None
        given = mixed(asked(inputs, targets), mix) if alpha > 0 or hint else None
        terms = held(outputs, given, targets, mix)
        if hint:
            terms["hidden"] = hint[0](graph.tapped, asked.hidden)
        if also:
            seen = augment.seen if augment else inputs
            terms["also"] = also(seen, outputs, targets, lambda other: sum(held(other, given, targets, mix).values(), start=zero(other)))
        for term, value in terms.items():
            note(term, value)
        return sum(terms.values(), start=zero(outputs))

    def zero(outputs: Any) -> Tensor:
        return torch.zeros((), device=next(tensors(outputs)).device)

    return fit(graph, task, loss, how, workdir, companions)
