"""Expensive activation functions replaced by cheap ones of nearly the same form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..errors import StepError, near
from ..graph import Graph
from ..graph.model import aten, owners
from ..step import Plan, Stage, Step, option
from ..task import Task, calibration, call, tensors

_SMOOTH: dict[Any, str] = {
    aten.gelu.default: "gelu",
    aten.silu.default: "silu",
    aten.mish.default: "mish",
    aten.elu.default: "elu",
    aten.softplus.default: "softplus",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
}
_CHEAP: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "hardswish": (aten.hardswish.default, ()),
    "relu": (aten.relu.default, ()),
    "hardsigmoid": (aten.hardsigmoid.default, ()),
    "hardtanh": (aten.hardtanh.default, (-1.0, 1.0)),
}
_INSTEAD = {"sigmoid": ("hardsigmoid",), "tanh": ("hardtanh",)}  # of the others: hard-swish or ReLU


@dataclass(frozen=True)
class Activations(Step):
    """GELU, SiLU, Mish and the like become hard-swish (Howard et al. 2019, section 5.2) or ReLU, sigmoid and tanh straight pieces.

    They are tried one by one, those before as they were decided: the cheap function that moves the outputs least on calibration data takes
    the place, unless all that was replaced then moves them by more than the `limit`, relative to their mean square. Training toward the
    original (`distill.Logits`) makes good much more: raise the limit where it follows.
    """

    stage: ClassVar[Stage | None] = Stage.STRUCTURE
    needs: ClassVar[tuple[str, ...]] = ("calibration",)

    limit: float = option(0.01, "most relative squared change of the outputs by all that is replaced")
    by: str | tuple[str, ...] = option(tuple(_CHEAP), f"cheap functions that may come in: {', '.join(_CHEAP)}")
    samples: int = option(64, "calibration samples on which the change is measured")
    include: str | tuple[str, ...] = option("*", "glob patterns of the modules in which the functions stand")

    def __post_init__(self) -> None:
        for name in (self.by,) if isinstance(self.by, str) else self.by:
            if name not in _CHEAP:
                raise StepError(f"lighten.Activations: there is no {name!r}.", f"one of {', '.join(_CHEAP)}, such as {near(name, _CHEAP)}")
        if self.limit <= 0 or self.samples < 1:
            raise StepError(f"lighten.Activations: limit is {self.limit}, samples {self.samples}.", "a limit above 0 and at least 1 sample")

    def plan(self, graph: Graph, task: Task) -> Plan:
        trial, changes, skipped = graph.copy(), dict[str, dict[str, Any]](), dict[str, str]()
        inputs = list(calibration(task, self.samples))
        wanted = [_outputs(graph, value) for value in inputs]
        wished = (self.include,) if isinstance(self.include, str) else self.include
        for node in trial.find(*_SMOOTH):
            kind, place = _SMOOTH[node.target], owners([node])
            known = [name for name in _INSTEAD.get(kind, ("hardswish", "relu")) if name in self.by]
            if not known or not any(fnmatchcase(place, pattern) for pattern in wished):
                skipped[node.name] = f"{kind} in {place} is excluded"
                continue
            old, found = (node.target, node.args, node.kwargs), dict[str, float]()
            for name in known:
                _become(node, name)
                trial.recompile()
                found[name] = _off(lambda value: _outputs(trial, value), inputs, wanted)
            best = min(found, key=found.__getitem__)
            if found[best] <= self.limit:
                _become(node, best)
                changes[node.name] = {"was": kind, "is": best, "in": place, "change": found[best]}
            else:
                node.target, node.args, node.kwargs = old
                skipped[node.name] = f"{best} in the place of {kind} in {place} would move the outputs by {found[best]:.2g}"
            trial.recompile()
        return Plan(changes, skipped or ({} if changes else {"*": "the network has no smooth activation function"}))

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        for node in graph.fx.nodes:
            if node.name in plan.changes:
                _become(node, plan.changes[node.name]["is"])
        graph.recompile()
        return {"change": max(change["change"] for change in plan.changes.values())}


def _become(node: fx.Node, name: str) -> None:
    target, rest = _CHEAP[name]
    node.target, node.args, node.kwargs = target, (node.args[0], *rest), {}


@torch.no_grad()
def _outputs(graph: Graph, inputs: Any) -> list[Tensor]:
    return [value.double() for value in tensors(call(graph.eval(), inputs)) if value.is_floating_point()]


def _off(outputs: Callable[[Any], list[Tensor]], inputs: list[Any], wanted: list[list[Tensor]]) -> float:
    """Squared change of the outputs relative to their mean square, over all samples."""
    change = total = 0.0
    for value, theirs in zip(inputs, wanted, strict=True):
        for a, b in zip(outputs(value), theirs, strict=True):
            change, total = change + float((a - b).square().sum()), total + float(b.square().sum())
    return change / max(total, 1e-30)
