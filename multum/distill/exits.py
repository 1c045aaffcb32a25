"""Early exits: a network that stops where it is sure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..analyze import analyze
from ..errors import StepError
from ..export.formats import written
from ..export.nested import nested
from ..graph import Graph, capture, layers, spec
from ..graph.split import graft, split
from ..step import Plan, option
from ..task import Batches, Predict, Task, batch_size, call, logits
from ..train import Training
from ..train.losses import imitation
from ..train.memory import picked
from .logits import Logits
from .places import is_signal, points

_PLACE = "exits"  # under which name a graph keeps its exits
_THRESHOLDS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)


@dataclass(frozen=True)
class Self(Logits):
    """Puts cheap heads behind blocks of the network, which the deepest teaches while it learns itself (Zhang et al. 2019, section 3).

    The result gives what the original gives. Its exits lie with the weights in one file: `distill.exits(graph)` cuts it there, and
    `distill.Cascade` runs the parts, for each sample only as far as needed. It comes last: a step that edits the graph afterwards leaves
    the network without exits.
    """

    replaceable: ClassVar[bool] = False

    exits: tuple[float, ...] = option((1 / 3, 2 / 3), "after which shares of the multiplications there is an exit")
    hidden: int = option(64, "channels of the layer in each exit")
    weight: float = option(1.0, "of each exit's loss, beside the deepest's")

    def plan(self, graph: Graph, task: Task) -> Plan:
        if self.hidden < 1 or self.weight <= 0 or not self.exits or not all(0 < share < 1 for share in self.exits):
            given = f"exits {self.exits}, hidden {self.hidden}, weight {self.weight}"
            raise StepError(f"The exits are given by {given}.", "shares between 0 and 1, and numbers above zero")
        _classes(graph)
        found = points(graph)
        shares = _shares(graph, found)
        chosen = sorted({min(range(len(found)), key=lambda place: abs(shares[place] - share)) for share in self.exits} if found else ())
        if not chosen:
            raise StepError("There is no place for an exit.", "residual blocks, activations or layers before the last one")
        places = [[place, found[place].meta.get("module") or found[place].name, round(shares[place], 3)] for place in chosen]
        return Plan({"*": super().plan(graph, task).changes["*"] | {"exits": places, "hidden": self.hidden, "weight": self.weight}})

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        found = points(graph)
        chosen = [found[place] for place, *_ in plan.changes["*"]["exits"]]
        with torch.random.fork_rng([]):
            torch.manual_seed(task.seed)
            heads = [_head(node, self.hidden, _classes(graph)).to(next(graph.parameters()).device) for node in chosen]
        ends = [graft(graph, node, head, f"{_PLACE}.e{place}") for place, (node, head) in enumerate(zip(chosen, heads, strict=True))]
        graph.tap(ends)

        def also(seen: Any, outputs: Any, targets: Any, held: Callable[[Any], Tensor]) -> Tensor:
            deepest = self._as_outputs(graph, logits(outputs).detach())
            answers = [self._as_outputs(graph, value) for value in graph.tapped]
            terms = [held(answer) + imitation(answer, deepest, targets, self.temperature) for answer in answers]
            return self.weight * sum(terms[1:], terms[0])

        def scores(predict: Predict) -> list[float]:
            def exit_of(place: int, inputs: Any) -> Any:
                answer = predict(inputs)
                return answer if place == len(ends) else self._as_outputs(graph, graph.tapped[place])

            return [float(np.mean(task.score(partial(exit_of, place)))) for place in range(len(ends) + 1)]

        def judge(predict: Predict, data: Batches) -> float:
            """The mean score of all exits."""
            return float(np.mean(scores(predict)))

        try:
            measured = self._learn(graph, plan, task.but(metric=judge), workdir, also=also)
            if task.validation is not None:
                measured["exits"] = scores(lambda inputs: call(graph, inputs))
        finally:
            graph.tap()
        own = {name: value for name, value in graph.named_tensors() if name.startswith(f"{_PLACE}.")}
        graph.clean()
        for name, value in own.items():
            graph.set_tensor(name, value, parameter=isinstance(value, nn.Parameter))
        for exit, (place, *_) in enumerate(plan.changes["*"]["exits"]):
            graph.set_tensor(f"{_PLACE}.e{exit}.place", torch.tensor([place], dtype=torch.int32))
        return measured

    def _training(self, graph: Graph) -> Training:
        return replace(super()._training(graph), fresh=_PLACE)

    def _as_outputs(self, graph: Graph, value: Tensor) -> Any:
        return spec.unflatten([value], graph.outputs)


def exits(graph: Graph) -> list[Graph]:
    """The parts between the exits of a graph trained by `Self`, or of one loaded from its file; the last one is without an exit.

    Each gives its exit's outputs and what the next part takes: run them by `Cascade`, or export each. Raises StepError for a graph
    without exits.
    """
    names = {name.split(".")[1] for name, _ in graph.named_tensors() if name.startswith(f"{_PLACE}.")}
    if not names:
        raise StepError("The graph has no exits.", "a graph that distill.Self has trained")
    whole = graph.copy()
    found, heads = points(whole), list[fx.Node]()
    for name in sorted(names, key=lambda name: int(name[1:])):
        node = found[int(whole.tensor(f"{_PLACE}.{name}.place"))]
        head = _head(node, len(whole.tensor(f"{_PLACE}.{name}.body.weight")), _classes(graph))
        for own, _ in list(head.named_tensors()):
            head.set_tensor(own, graph.tensor(f"{_PLACE}.{name}.{own}").clone())
        heads.append(graft(whole, node, head, f"{_PLACE}.{name}"))
    return split(whole, heads, [[head] for head in heads])


class Cascade:
    """Runs the parts of a network with exits, each sample only until its largest probability reaches the threshold.

    The parts are those of `exits`, or sessions on what they were exported to. Inputs and outputs are those of the whole network;
    `left` [n] says where each sample of the last call left, counted from 0.
    """

    def __init__(self, parts: Sequence[Callable[..., Any]], threshold: float = 0.9):
        if len(parts) < 2:
            raise StepError("There is one part.", "the parts of distill.exits(graph)")
        self.parts, self.threshold, self.left = parts, threshold, torch.zeros(0, dtype=torch.long)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs: Any = kwargs or args
        size = batch_size(inputs)
        rows, self.left = torch.arange(size), torch.zeros(size, dtype=torch.long)
        result: Tensor | None = None
        answer: Any = None
        for place, part in enumerate(self.parts):
            answer = call(part, inputs)
            if place < len(self.parts) - 1:
                answer, *carried = answer
                value = logits(answer)
                sure = value.softmax(-1).amax(-1) >= self.threshold
            else:
                value, sure = logits(answer), torch.ones(len(rows), dtype=torch.bool)
            if result is None and bool(sure.all()):  # all together
                self.left += place
                return answer
            result = value.new_empty(size, value.shape[-1]) if result is None else result
            result[rows[sure]] = value[sure]
            self.left[rows[sure]] = place
            if bool(sure.all()):
                break
            inputs, rows = (tuple(carried), rows) if not bool(sure.any()) else (tuple(picked(carried, ~sure)), rows[~sure])
        return spec.unflatten([result], spec.spec_of(answer))

    def export(self, path: str | Path) -> Path:
        """Writes the parts, which must be graphs, as one ONNX file that stops where it is sure, at this threshold (see `export.nested`).

        A session on it needs no call for each part: most for samples one by one, since a batch goes on together until all of it are sure.
        Raises ExportError, FileError.
        """
        graphs = [part for part in self.parts if isinstance(part, Graph)]
        if len(graphs) < len(self.parts):
            raise StepError("The parts are not graphs.", "the parts of distill.exits(graph)")
        return written(nested(graphs, self.threshold), path)

    def settle(self, task: Task, drop: float = 0.3) -> dict[float, tuple[float, float]]:
        """Takes the lowest threshold at which no more than `drop` of the validation score is lost beside no exit at all.

        Returns for each threshold that was tried the score and the mean number of parts that a sample ran through.
        """
        found: dict[float, tuple[float, float]] = {}
        for self.threshold in (2.0, *_THRESHOLDS):  # a probability of 2: nobody leaves early
            counts = list[Tensor]()

            def predict(inputs: Any, counts: list[Tensor] = counts) -> Any:
                answer = call(self, inputs)
                counts.append(self.left + 1.0)
                return answer

            found[self.threshold] = float(np.mean(task.score(predict))), float(torch.cat(counts).mean())
            lost = found[2.0][0] - found[self.threshold][0]
            if self.threshold < 1 and (lost if task.higher_is_better else -lost) <= drop:
                return found
        self.threshold = 2.0
        return found


def _shares(graph: Graph, nodes: Sequence[fx.Node]) -> list[float]:
    """The share of all multiplications that are done when each of the nodes is computed."""
    counts = {row.name: row.macs or 0 for row in analyze(graph, latency=False).layers}
    order = {node: place for place, node in enumerate(graph.fx.nodes)}
    rows = [(order[layer.node], counts.get(layer.name, 0)) for layer in layers(graph)]
    whole = max(1, sum(count for _, count in rows))
    return [sum(count for place, count in rows if place <= order[node]) / whole for node in nodes]


def _classes(graph: Graph) -> int:
    """The number of classes of the one output. Raises StepError when there are others."""
    results = [node.meta.get("val") for node in graph.fx.output_node().args[0][: spec.check(graph.outputs)]]  # type: ignore[index, union-attr]
    if len(results) != 1 or not isinstance(results[0], Tensor) or results[0].ndim != 2 or results[0].shape[1] < 2:
        raise StepError("Nobody can say when the outputs are sure.", "one output, logits [n, classes]")
    return int(results[0].shape[1])


class _Ends(nn.Module):
    """The first of the positions [n, t, d] and the mean of all, [n, 2 d]."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, 0], x.mean(1)], 1)


def _head(node: fx.Node, hidden: int, classes: int) -> Graph:
    """An exit for what a node gives: one layer, and from its mean over places to classes."""
    size = tuple(node.meta["val"].shape[1:])
    rows: list[tuple[str, nn.Module]]
    if len(size) >= 3 or is_signal(node):
        conv, norm, pool = (getattr(nn, f"{name}{len(size) - 1}d") for name in ("Conv", "BatchNorm", "AdaptiveAvgPool"))
        rows = [("act", nn.ReLU()), ("body", conv(size[0], hidden, 3, 2, 1, bias=False)), ("norm", norm(hidden)), ("relu", nn.ReLU())]
        rows += [("pool", pool(1)), ("flat", nn.Flatten())]
    else:
        first: list[tuple[str, nn.Module]] = [("ends", _Ends())] if len(size) == 2 else []
        rows = [*first, ("body", nn.Linear(size[-1] * (1 + len(first)), hidden)), ("relu", nn.ReLU())]
    module = nn.Sequential(OrderedDict([*rows, ("head", nn.Linear(hidden, classes))]))
    return capture(module, torch.zeros(2, *size))
