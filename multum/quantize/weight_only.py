"""`WeightOnly`: weights on a grid, activations in float. Needs no data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..errors import StepError
from ..graph import Graph, Layer, layers, select
from ..graph.layers import weight
from ..step import Plan, Stage, Step, option
from ..task import Task
from .insert import quantize_weight

KINDS = ("conv", "linear", "embedding", "rnn")


@dataclass(frozen=True)
class WeightOnly(Step):
    """Rounds the weights to integers, with a scale per output channel: smaller files, not faster networks. Training can follow."""

    stage: ClassVar[Stage | None] = Stage.NUMBERS

    bits: int = option(8, "bits of a weight, 2 to 8")
    edges: int = option(8, "least bits of the first and the last layer")
    include: str | tuple[str, ...] = option("*", "glob patterns of layers")
    exclude: str | tuple[str, ...] = option((), "glob patterns of layers to leave in float")

    def __post_init__(self) -> None:
        check_bits(self.bits, self.edges)

    def plan(self, graph: Graph, task: Task) -> Plan:
        chosen, skipped = choose(graph, self.include, self.exclude)
        for layer in chosen:
            if layer.quantizer() is not None:
                raise StepError(f"The layer {layer.name!r} is quantized already.", "each layer quantized once", f"exclude {layer.name!r}")
        return Plan({layer.name: entry for layer, entry in weight_entries(chosen, self.bits, self.edges)}, skipped)

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        quantize_weights(graph, plan)
        graph.recompile()
        return {}


def choose(graph: Graph, include: str | tuple[str, ...], exclude: str | tuple[str, ...]) -> tuple[list[Layer], dict[str, str]]:
    """The layers to quantize and the reason for each other one."""
    known = [layer for layer in layers(graph) if layer.kind in KINDS]
    chosen = {layer.name for layer in select(graph, include, exclude, KINDS)}
    skipped = {layer.name: "excluded by name" for layer in known if layer.name not in chosen}
    for layer in known:
        sharers = {other.name for other in known if other.weight == layer.weight}
        values = weight(graph, layer)
        if layer.name not in chosen:
            continue
        if not values.is_floating_point() or not torch.isfinite(values).all():
            skipped[layer.name] = "its weight holds NaN, infinite values or no floating-point numbers"
        elif not sharers <= chosen:
            skipped[layer.name] = f"shares its weight with {', '.join(sorted(sharers - chosen))}, which stays in float"
    return [layer for layer in known if layer.name not in skipped], skipped


def check_bits(*numbers: int) -> None:
    """Raises StepError for a number of bits that no quantizer here has."""
    for bits in numbers:
        if not 2 <= bits <= 8:
            raise StepError(f"{bits} bits are asked for.", "2 to 8 bits")


def weight_entries(chosen: list[Layer], bits: int, edges: int) -> list[tuple[Layer, dict[str, Any]]]:
    """What is planned for the weight of each layer; nothing where it is on a grid already."""
    ends = {layer.weight for layer in (chosen[:1] + chosen[-1:])}
    bits_of = {layer: max(bits, edges) if layer.weight in ends else bits for layer in chosen}
    return [(layer, {} if layer.quantizer() else {"weight": {"bits": bits_of[layer], "axis": layer.scale_axis}}) for layer in chosen]


def quantize_weights(graph: Graph, plan: Plan) -> None:
    """Puts the planned quantizers on the weights; a tensor that several layers use gets one."""
    done = set[str]()
    for layer in layers(graph):
        entry = plan.changes.get(layer.name, {})
        if "weight" in entry and layer.weight not in done:
            quantize_weight(graph, layer, entry["weight"]["bits"], entry["weight"].get("scale"))
            done.add(layer.weight)
