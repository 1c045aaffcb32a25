"""`Dynamic`: integer weights, and activations whose range is measured in every call. Needs no data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import fx

from ..export.dynamic import quantize_in_calls
from ..graph import Graph, Layer
from ..graph.matrix import data
from ..graph.model import aten
from ..step import Plan, Stage, Step, option
from ..task import Task
from .insert import check_activations
from .weight_only import choose, round_weights, weight_entries

_BITS = 8


@dataclass(frozen=True)
class Dynamic(Step):
    """Weights as 8-bit integers; inputs of linear layers as 8-bit integers on a range that is measured in every call. Needs no data.

    Linear layers run in integer kernels of ONNX Runtime (DynamicQuantizeLinear, MatMulInteger); OpenVINO computes that slower than fp32.
    Weights of other layers are rounded alone: engines have no fast kernels for them. The range is that of the whole batch, so a sample's
    outputs depend a little on its company. Comes last: rounding stops gradients.
    """

    stage: ClassVar[Stage | None] = Stage.NUMBERS

    include: str | tuple[str, ...] = option("*", "glob patterns of layers")
    exclude: str | tuple[str, ...] = option((), "glob patterns of layers to leave in float")

    def plan(self, graph: Graph, task: Task) -> Plan:
        check_activations(graph)
        chosen, skipped = choose(graph, self.include, self.exclude)
        changes = {layer.name: entry for layer, entry in weight_entries(chosen, _BITS, _BITS)}
        for layer in chosen:
            if _runs(layer):
                changes[layer.name]["input"] = {"bits": _BITS, "range": "of the batch, measured in every call"}
            elif not changes[layer.name]:
                skipped[layer.name] = "its weight is quantized already, and no integer kernel measures the range of its input"
        return Plan({name: change for name, change in changes.items() if change}, skipped)

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        round_weights(graph, graph, plan, task, 0)
        readers: dict[fx.Node, list[fx.Node]] = {}
        for layer in choose(graph, self.include, self.exclude)[0]:
            if "input" in plan.changes.get(layer.name, ()):
                readers.setdefault(data(layer), []).append(layer.node)
        for value, several in readers.items():
            quantize_in_calls(graph, value, several)
        graph.recompile()
        graph.refresh()
        return {"integer products": len([node for several in readers.values() for node in several])}


def _runs(layer: Layer) -> bool:
    return layer.node.target is aten.linear.default and layer.position == 1 and data(layer).op != "get_attr"
