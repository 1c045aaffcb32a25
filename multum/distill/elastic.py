"""One network that runs at several widths and depths."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
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
from ..graph.residual import blocks, skip
from ..prune import Blocks, Channels
from ..prune.blocks import end_of
from ..step import Plan, option
from ..task import Batches, Predict, Task
from ..train import arrange
from ..train.losses import imitation
from .logits import Logits

_PLACE = "elastic"  # under which name a graph keeps what its widths and depths have of their own
_MASK = re.compile(rf"{_PLACE}\.w([\d_]+(?:d[\d_]+)?)\.mask$")
_STATISTICS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Elastic(Logits):
    """Trains the network so that it runs at other widths and depths too, with slices of its weights (Yu & Huang 2019, sections 3.1, 3.2).

    Every step trains the largest toward the original, and the smallest and one in between toward the largest. A depth leaves out residual
    blocks, evenly (Cai et al. 2020, section 3.2), at every width. Each network has batch normalization of its own (Yu et al. 2019, section
    3.3), which lies with the weights in one file; `distill.slices(graph)` gives them. It comes last: a step that edits the graph
    afterwards leaves the largest only.
    """

    replaceable = False

    widths: tuple[float, ...] = option((0.75, 0.5, 0.25), "shares of the channels, beside all of them")
    depths: tuple[float, ...] = option((), "shares of the residual blocks, beside all of them, such as (0.5,)")

    def plan(self, graph: Graph, task: Task) -> Plan:
        for what, given in (("widths", self.widths), ("depths", self.depths)):
            if not all(0 < share < 1 for share in given) or len(set(given)) < len(given) or not (self.widths or self.depths):
                raise StepError(f"The {what} are {given}.", "different shares between 0 and 1, such as (0.75, 0.5, 0.25)")
        keeps, ends = dict[str, Any](), {f"{depth:g}": _ends(graph, depth) for depth in sorted(self.depths, reverse=True)}
        for width in sorted(self.widths, reverse=True):
            plan = Channels(ratio=1 - width, criterion="magnitude", multiple=1, floor=0.0).plan(graph, task)
            if not plan.changes:
                raise StepError(f"There is no channel to leave out for a width of {width}.", "channels that can be cut")
            keeps[f"{width:g}"] = {name: change["keep"] for name, change in plan.changes.items()}
        return Plan({"*": super().plan(graph, task).changes["*"] | {"widths": keeps, "depths": ends}})

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        device, groups, narrower = next(graph.parameters()).device, axes(graph), list[_Slice]()
        kinds = itertools.product({"1": {}, **plan.changes["*"]["widths"]}.items(), {"1": {}, **plan.changes["*"]["depths"]}.items())
        for (width, keep), (depth, ends) in sorted(kinds, key=lambda kind: -float(kind[0][0]) * float(kind[1][0])):
            if not keep and not ends:
                continue
            name, narrow = _name(width, depth), _cut(graph, keep, ends)
            mask = [groups.mask(group.axis, keep) for group in groups]
            graph.set_tensor(_of(name, "mask"), torch.cat(mask).to(torch.uint8).to(device))
            for tensor in _own(narrow):
                value = narrow.tensor(tensor)
                graph.set_tensor(_of(name, tensor), value.clone(), parameter=isinstance(value, nn.Parameter))
            narrower.append(_Slice(graph, narrow, groups, name, keep))

        def also(inputs: Any, outputs: Any, targets: Any, held: Callable[[Any], Tensor]) -> Tensor:
            goal = spec.unflatten([leaf.detach() for leaf in spec.flatten(outputs, graph.outputs)], graph.outputs)
            chosen = {len(narrower) - 1, int(torch.randint(len(narrower), ()))}
            terms = [imitation(narrower[place](inputs), goal, targets, self.temperature) for place in sorted(chosen)]
            return sum(terms[1:], terms[0])

        def judge(predict: Predict, data: Batches) -> float:
            """The mean score of all networks."""
            for one in narrower:
                one.graph.eval()
            every: list[Predict] = [predict, *narrower]
            scores = [float(np.mean(task.score(one))) for one in every]
            for one in narrower:
                one.graph.train()
            return float(np.mean(scores))

        return self._learn(graph, plan, task.but(metric=judge), workdir, also=also)


class _Slice:
    """A smaller network whose weights are slices, with gradients, of those of the largest."""

    def __init__(self, graph: Graph, narrow: Graph, groups: Groups, name: str, keep: Keep):
        self.whole, self.graph, self.name = graph, narrow.train(), name
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


def slices(graph: Graph, depth: float = 1.0) -> dict[float, Graph]:
    """The networks of a depth that a graph trained by `Elastic`, or one loaded from its file, holds: by width, 1.0 all channels.

    Each is ready to be called; to switch is to take another. Raises StepError for a graph that holds none.
    """
    known = [tuple(map(float, match[1].replace("_", ".").split("d"))) for name, _ in graph.named_tensors() if (match := _MASK.match(name))]
    if depth not in (1.0, *(of for _, *depths in known for of in depths)) or not known:
        held = f"several, {known}" if known else "one"
        raise StepError(f"Depth {depth} is asked for, and of widths and depths the graph has {held}.", "what distill.Elastic has trained")
    found, groups, ends = ({1.0: graph} if depth == 1 else {}), axes(graph), _ends(graph, depth) if depth < 1 else {}
    for width, *depths in known:
        if (depths or [1.0]) != [depth]:
            continue
        name, keep, begin = _name(f"{width:g}", f"{depth:g}"), dict[str, list[int]](), 0
        mask = graph.tensor(_of(name, "mask"))
        for group in groups:
            own = mask[begin : begin + group.size]
            begin += group.size
            if not bool(own.all()):
                keep[group.name] = own.nonzero().flatten().tolist()
        narrow = _cut(graph, keep, ends)
        for tensor in _own(narrow):
            narrow.set_tensor(tensor, graph.tensor(_of(name, tensor)).clone())
        found[width] = narrow.eval()
    return found


def _name(width: str, depth: str) -> str:
    return (width if depth == "1" else f"{width}d{depth}").replace(".", "_")


def _of(name: str, tensor: str) -> str:
    return f"{_PLACE}.w{name}.{tensor}"


def _ends(graph: Graph, depth: float) -> dict[str, str]:
    """The blocks that a depth leaves out, with their ends."""
    plan = Blocks(ratio=1 - depth, criterion="even").plan(graph, Task(graph, graph.example()[0]))
    if not plan.changes:
        raise StepError(f"There is no block to leave out for a depth of {depth}.", "residual blocks, of which some are alike")
    return {name: change["end"] for name, change in plan.changes.items()}


def _cut(graph: Graph, keep: Keep, ends: Mapping[str, str]) -> Graph:
    narrow = graph.copy()
    surgery.cut(narrow, keep)
    skip(narrow, [(block, end_of(block, ends[block.name])) for block in blocks(narrow) if block.name in ends])
    return narrow


def _own(graph: Graph) -> set[str]:
    """The tensors of batch normalization."""
    nodes = graph.find(aten.batch_norm.default)
    return {str(part.target) for node in nodes for name in _STATISTICS if hasattr(part := read(node, name), "target")}
