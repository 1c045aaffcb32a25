"""One network that runs at several widths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import StepError
from ..graph import Graph, spec, surgery
from ..graph.axes import Groups, Keep, axes
from ..graph.capture import arguments
from ..graph.model import aten, read
from ..prune import Channels
from ..step import Plan, option
from ..task import Batches, Predict, Task
from ..train import arrange
from ..train.losses import imitation
from .logits import Logits

_PLACE = "elastic"  # under which name a graph keeps what its widths have of their own
_STATISTICS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Elastic(Logits):
    """Trains the network so that it runs at other widths too, each a slice of its weights (Yu & Huang 2019, sections 3.1 and 3.2).

    Every step trains the widest toward the original, and the narrowest and one width in between toward the widest. Each width has batch
    normalization of its own (Yu et al. 2019, section 3.3), which lies with the weights in one file; `distill.slices(graph)` gives the
    networks. It comes last: a step that edits the graph afterwards leaves the widest only.
    """

    replaceable = False

    widths: tuple[float, ...] = option((0.75, 0.5, 0.25), "shares of the channels, beside all of them")

    def plan(self, graph: Graph, task: Task) -> Plan:
        if not self.widths or not all(0 < width < 1 for width in self.widths) or len(set(self.widths)) < len(self.widths):
            raise StepError(f"The widths are {self.widths}.", "different shares between 0 and 1, such as (0.75, 0.5, 0.25)")
        keeps = {}
        for width in sorted(self.widths, reverse=True):
            plan = Channels(ratio=1 - width, criterion="magnitude", multiple=1, floor=0.0).plan(graph, task)
            if not plan.changes:
                raise StepError(f"There is no channel to leave out for a width of {width}.", "channels that can be cut")
            keeps[f"{width:g}"] = {name: change["keep"] for name, change in plan.changes.items()}
        return Plan({"*": super().plan(graph, task).changes["*"] | {"widths": keeps}})

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        keeps: dict[str, Keep] = plan.changes["*"]["widths"]
        device = next(graph.parameters()).device
        groups = axes(graph)
        for name, keep in keeps.items():
            mask = [groups.mask(group.axis, keep) for group in groups]
            graph.set_tensor(_of(name, "mask"), torch.cat(mask).to(torch.uint8).to(device))
            narrow = _cut(graph, keep)
            for tensor in _own(narrow):
                value = narrow.tensor(tensor)
                graph.set_tensor(_of(name, tensor), value.clone(), parameter=isinstance(value, nn.Parameter))
        narrower = [_Slice(graph, groups, name, keep) for name, keep in keeps.items()]

        def also(inputs: Any, outputs: Any, targets: Any, held: Callable[[Any], Tensor]) -> Tensor:
            goal = spec.unflatten([leaf.detach() for leaf in spec.flatten(outputs, graph.outputs)], graph.outputs)
            chosen = {len(narrower) - 1, int(torch.randint(len(narrower), ()))}
            terms = [imitation(narrower[place](inputs), goal, targets, self.temperature) for place in sorted(chosen)]
            return sum(terms[1:], terms[0])

        def judge(predict: Predict, data: Batches) -> float:
            """The mean score of all widths."""
            for one in narrower:
                one.graph.eval()
            every: list[Predict] = [predict, *narrower]
            scores = [float(np.mean(task.score(one))) for one in every]
            for one in narrower:
                one.graph.train()
            return float(np.mean(scores))

        return self._learn(graph, plan, task.but(metric=judge), workdir, also=also)


class _Slice:
    """A narrower network whose weights are slices, with gradients, of those of the widest."""

    def __init__(self, graph: Graph, groups: Groups, name: str, keep: Keep):
        self.whole, self.graph, self.name = graph, _cut(graph, keep).train(), name
        self.own = _own(self.graph)
        self.indices: dict[str, list[tuple[int, Tensor]]] = {}
        for tensor, dims in groups.tensors.items():
            cut = [(dim, axis) for dim, axis in enumerate(dims) if groups.size(axis, keep) != axis.size]
            self.indices[tensor] = [(dim, groups.mask(axis, keep).nonzero().flatten()) for dim, axis in cut]

    def __call__(self, inputs: Any) -> Any:
        args, kwargs = arguments(arrange(inputs, next(self.whole.parameters()).device))
        held = {f"tensors.{name}": self._tensor(name) for name, _ in self.graph.named_tensors()}
        return torch.func.functional_call(self.graph, held, args, kwargs)

    def _tensor(self, name: str) -> Tensor:
        if name in self.own:
            return self.whole.tensor(_of(self.name, name))
        value = self.whole.tensor(name)
        for dim, index in self.indices.get(name, ()):
            value = value.index_select(dim, index.to(value.device))
        return value


def slices(graph: Graph) -> dict[float, Graph]:
    """The networks that a graph trained by `Elastic`, or one loaded from its file, holds: by width, 1.0 the graph itself.

    Each is ready to be called; to switch is to take another. Raises StepError for a graph that holds none.
    """
    names = [name for name, _ in graph.named_tensors() if name.startswith(f"{_PLACE}.") and name.endswith(".mask")]
    if not names:
        raise StepError("The graph has one width only.", "a graph that distill.Elastic has trained", "distill.student cuts one")
    found, groups = {1.0: graph}, axes(graph)
    for name in names:
        width, mask, keep, begin = name.split(".")[1][1:].replace("_", "."), graph.tensor(name), dict[str, list[int]](), 0
        for group in groups:
            own = mask[begin : begin + group.size]
            begin += group.size
            if not bool(own.all()):
                keep[group.name] = own.nonzero().flatten().tolist()
        narrow = _cut(graph, keep)
        for tensor in _own(narrow):
            narrow.set_tensor(tensor, graph.tensor(_of(width, tensor)).clone())
        found[float(width)] = narrow.eval()
    return found


def _of(width: str, name: str) -> str:
    return f"{_PLACE}.w{width.replace('.', '_')}.{name}"


def _cut(graph: Graph, keep: Keep) -> Graph:
    narrow = graph.copy()
    surgery.cut(narrow, keep)
    return narrow


def _own(graph: Graph) -> set[str]:
    """The tensors of batch normalization."""
    nodes = graph.find(aten.batch_norm.default)
    return {str(part.target) for node in nodes for name in _STATISTICS if hasattr(part := read(node, name), "target")}
