"""`Activations`: bounded activation functions with few values, smooth ones in pieces."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

from torch import fx

from ..errors import StepError, near
from ..graph import Graph
from ..graph.layers import QUANTIZERS
from ..graph.model import aten, read
from ..step import Plan, Stage, Step, option
from ..task import Task
from .grid import Grid
from .insert import put_scale, quantize_value

_LEAST = {"sigmoid": 1, "tanh": 2}  # bits: 0 and 1; -1, 0 and 1
_BOUNDED: dict[Any, str] = {
    aten.sigmoid.default: "sigmoid", aten.hardsigmoid.default: "sigmoid", aten.tanh.default: "tanh", aten.hardtanh.default: "tanh",
}  # fmt: skip
_HARD = {
    aten.sigmoid.default: aten.hardsigmoid.default,
    aten.tanh.default: aten.hardtanh.default,
    aten.silu.default: aten.hardswish.default,
}
_SMOOTH = (*_BOUNDED, *_HARD, aten.gelu.default, aten.elu.default, aten.softplus.default, aten.mish.default)


@dataclass(frozen=True)
class Activations(Step):
    """Gives sigmoids and hyperbolic tangents 2^bits values, evenly spaced: what an integer table holds. Training can follow.

    One bit makes a sigmoid a step, two bits make a tanh -1, 0 or 1 (Hubara et al. 2016, "Binarized neural networks", section 1.3);
    gradients pass straight through. With `hard` sigmoid, tanh and SiLU become their forms in pieces of straight lines first (Howard et al.
    2019, "MobileNetV3", section 5.2). Gates inside of recurrent layers are one operator with them and stay.
    """

    stage: ClassVar[Stage | None] = Stage.NUMBERS

    bits: int = option(8, "bits of an output of sigmoid, 1 to 8, or tanh, which has at least 2")
    hard: bool = option(False, "put the forms in straight pieces in the place of sigmoid, tanh and SiLU")
    include: str | tuple[str, ...] = option("*", "glob patterns of activation functions: names of modules, or of operators")
    exclude: str | tuple[str, ...] = option((), "glob patterns of activation functions to leave as they are")

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise StepError(f"quantize.Activations: bits is {self.bits!r}.", "1 to 8")

    def plan(self, graph: Graph, task: Task) -> Plan:
        found = [node for node in graph.fx.nodes if node.target in _SMOOTH]
        names = {node: str(node.meta.get("module") or node.name) for node in found}
        wanted, unwanted = ((given,) if isinstance(given, str) else given for given in (self.include, self.exclude))
        for pattern in (*wanted, *unwanted):
            if pattern != "*" and not any(fnmatchcase(name, pattern) for name in names.values()):
                options = near(pattern, list(names.values()))
                raise StepError(f"The pattern {pattern!r} matches no smooth activation function.", f"one such as {options}")
        changes, skipped = dict[str, dict[str, Any]](), dict[str, str]()
        for node, name in names.items():
            chosen = any(fnmatchcase(name, p) for p in wanted) and not any(fnmatchcase(name, p) for p in unwanted)
            change = self._change(graph, node)
            if not chosen:
                skipped[node.name] = "excluded by name"
            elif isinstance(change, str):
                skipped[node.name] = change
            else:
                changes[node.name] = {"where": name} | change
        return Plan(changes, skipped if names else {"*": "no smooth activation function stands outside of a recurrent layer"})

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        nodes = {node.name: node for node in graph.fx.nodes}
        for name, change in plan.changes.items():
            node = nodes[name]
            if change["form"] == "hard":
                node.target = _HARD[node.target]
                node.kwargs = {}
            if "bits" in change:
                put_scale(graph, name, change)
                quantize_value(graph, node, name, Grid(change["low"], change["high"]))
        graph.recompile()
        return {}

    def _change(self, graph: Graph, node: fx.Node) -> dict[str, Any] | str:
        """What becomes of an activation function, or why nothing does."""
        hard = self.hard and node.target in _HARD
        kind = _BOUNDED.get(node.target)
        if kind == "tanh" and (read(node, "min_val", -1.0), read(node, "max_val", 1.0)) != (-1.0, 1.0):
            kind = None  # such as ReLU6, which is in straight pieces already
        form = {"form": "hard" if hard else "as it is"}
        if kind is None:
            return form if hard else "its outputs have no bound that is always the same; quantize.Static measures one"
        if any(user.target in QUANTIZERS for user in node.users):
            return "its outputs are quantized already"
        bits = max(self.bits, _LEAST[kind])
        low, high = (0, (1 << bits) - 1) if kind == "sigmoid" else (1 - (1 << bits - 1), (1 << bits - 1) - 1)
        return form | {"bits": bits, "low": low, "high": high, "scale": 1.0 / high}
