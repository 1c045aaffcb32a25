"""Students that learn from each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import StepError
from ..graph import Graph, spec
from ..step import Plan, option
from ..task import Batches, Predict, Task, call
from ..train.losses import imitation
from .logits import Logits

_PLACE = "peers"  # under which name the graph holds the others' tensors while they train


@dataclass(frozen=True)
class Peers(Logits):
    """Trains several students together, each toward the mean of the others' outputs as well (Zhang et al. 2018, section 3.2).

    They are the graph and copies of it whose weights begin elsewhere; the best of them is the result. With `alpha` 0 nobody but the peers
    and the labels teaches, as in the paper.
    """

    replaceable = False

    count: int = option(2, "students, the graph among them")
    noise: float = option(0.1, "by how much the copies' weights are moved at the start, in deviations of each weight tensor")
    weight: float = option(1.0, "of the peers' outputs, beside the loss toward the original and the labels")

    def plan(self, graph: Graph, task: Task) -> Plan:
        if self.count < 2 or self.noise <= 0 or self.weight <= 0:
            given = f"count {self.count}, noise {self.noise}, weight {self.weight}"
            raise StepError(f"The peers are given by {given}.", "at least two, and numbers above zero")
        if self.bits is not None:
            raise StepError("The size is held for one network, not for its peers.", "bits=None", "distill.Logits(bits=...) afterwards")
        told = {"count": self.count, "noise": self.noise, "weight": self.weight}
        return Plan({"*": super().plan(graph, task).changes["*"] | told})

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        peers = [self._peer(graph, task.seed + place) for place in range(1, self.count)]
        sparse, names = graph.sparse, [name for name, _ in graph.named_tensors()]
        for place, peer in enumerate(peers):  # they train with the graph: its optimizer and its checkpoints hold their tensors too
            graph.tensors.add_module(f"{_PLACE}{place}", peer.tensors)
            graph.sparse |= {f"{_PLACE}{place}.{name}" for name in peer.sparse}

        def also(seen: Any, outputs: Any, targets: Any, held: Callable[[Any], Tensor]) -> Tensor:
            answers = [outputs, *(call(peer, seen) for peer in peers)]
            terms = [held(answer) for answer in answers[1:]]
            for place, answer in enumerate(answers):
                others = [self._still(other, graph) for other in answers[:place] + answers[place + 1 :]]
                terms += [self.weight / len(others) * imitation(answer, other, targets, self.temperature) for other in others]
            return sum(terms[1:], terms[0])

        def scores(predict: Predict) -> list[float]:
            for peer in peers:
                peer.eval()
            every: list[Predict] = [predict, *(partial(call, peer) for peer in peers)]
            found = [float(np.mean(task.score(one))) for one in every]
            for peer in peers:
                peer.train()
            return found

        def judge(predict: Predict, data: Batches) -> float:
            return (max if task.higher_is_better else min)(scores(predict))

        for peer in peers:
            peer.train()
        try:
            measured = self._learn(graph, plan, task.but(metric=judge), workdir, also=also)
        finally:
            graph.sparse = sparse
            for place in range(len(peers)):
                del graph.tensors._modules[f"{_PLACE}{place}"]
        if task.validation is None:
            return measured
        found = scores(partial(call, graph))
        best = found.index((max if task.higher_is_better else min)(found))
        for name in names if best else ():
            graph.set_tensor(name, peers[best - 1].tensor(name))
        return measured | {"peers": found, "best": best}

    def _peer(self, graph: Graph, seed: int) -> Graph:
        peer, random = graph.copy(), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in peer.parameters():
                if value.ndim > 1:
                    moved = torch.randn(value.shape, generator=random).to(value.device) * (self.noise * value.std(correction=0))
                    value.add_(moved.masked_fill(value == 0, 0))  # zeros may be meant
        return peer

    def _still(self, outputs: Any, graph: Graph) -> Any:
        return spec.unflatten([leaf.detach() for leaf in spec.flatten(outputs, graph.outputs)], graph.outputs)
