"""`WeightOnly`: weights on a grid, activations in float. Works without data, better with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..errors import StepError
from ..graph import Graph, Layer, layers, select
from ..graph.layers import weight
from ..step import Plan, Stage, Step, option
from ..task import Task
from .bias import correct_biases
from .insert import quantize_weight
from .integers import choose_integers
from .rounding import ROUNDINGS

ROUNDING = "auto, nearest, gptq, adaround or energy; auto is gptq up to 6 bits if there are data, else nearest"
_COARSE = 6  # bits up to which it pays
KINDS = ("conv", "linear", "embedding", "rnn")


@dataclass(frozen=True)
class WeightOnly(Step):
    """Rounds the weights to integers, with a scale per output channel: smaller files, not faster networks. Training can follow."""

    stage: ClassVar[Stage | None] = Stage.NUMBERS

    bits: int = option(8, "bits of a weight, 2 to 8")
    edges: int = option(8, "least bits of the first and the last layer")
    rounding: str = option("auto", ROUNDING)
    samples: int = option(256, "calibration samples that are looked at when data choose the integers")
    include: str | tuple[str, ...] = option("*", "glob patterns of layers")
    exclude: str | tuple[str, ...] = option((), "glob patterns of layers to leave in float")

    def __post_init__(self) -> None:
        check_bits(self.bits, self.edges)
        check_rounding(self.rounding)

    def plan(self, graph: Graph, task: Task) -> Plan:
        chosen, skipped = choose(graph, self.include, self.exclude)
        for layer in chosen:
            if layer.quantizer() is not None:
                raise StepError(f"The layer {layer.name!r} is quantized already.", "each layer quantized once", f"exclude {layer.name!r}")
        has_data = task.has("calibration")
        if not has_data and self.rounding not in ("auto", "nearest"):
            told = f"The rounding {self.rounding!r} looks at data, of which the task {task.name!r} has none."
            raise StepError(told, "Task(..., calibration=...)")
        entries = weight_entries(chosen, self.bits, self.edges, self.rounding if has_data else "nearest")
        return Plan({layer.name: entry for layer, entry in entries}, skipped)

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        original = graph.copy()
        found = round_weights(graph, original, plan, task, self.samples)
        return {"rounding": found, "bias_shifts": correct_biases(graph, original, found, task, self.samples)} if found else {}


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


def check_rounding(method: str) -> None:
    """Raises StepError for a rounding that is not known."""
    if method not in ("auto", *ROUNDINGS):
        raise StepError(f"The rounding is {method!r}.", f"one of auto, {', '.join(ROUNDINGS)}")


def weight_entries(
    chosen: list[Layer], bits: int | Mapping[str, int], edges: int, rounding: str = "nearest"
) -> list[tuple[Layer, dict[str, Any]]]:
    """What is planned for the weight of each layer; nothing where it is on a grid already. `bits` may differ by the weight's name."""
    ends = {layer.weight for layer in (chosen[:1] + chosen[-1:])}
    hidden = {layer.weight for layer in chosen if layer.kind not in ("conv", "linear")}  # what multiplies them is not seen
    found = []
    for layer in chosen:
        own = bits if isinstance(bits, int) else bits[layer.weight]
        entry: dict[str, Any] = {"bits": max(own, edges) if layer.weight in ends else own, "axis": layer.scale_axis}
        method = ("gptq" if entry["bits"] <= _COARSE else "nearest") if rounding == "auto" else rounding
        if method != "nearest" and layer.weight not in hidden:
            entry["rounding"] = method
        found.append((layer, {} if layer.quantizer() else {"weight": entry}))
    return found


def round_weights(graph: Graph, original: Graph, plan: Plan, task: Task, samples: int, biases: bool = True) -> dict[str, dict[str, float]]:
    """Puts the planned quantizers on the weights; a tensor that several layers use gets one. Returns what data had to say, by layer."""
    entries = {name: change["weight"] for name, change in plan.changes.items() if "weight" in change}
    done = set[str]()
    for layer in layers(graph):
        entry = entries.get(layer.name)
        if entry and "rounding" not in entry and layer.weight not in done:
            quantize_weight(graph, layer, entry["bits"], entry.get("scale"))
            done.add(layer.weight)
    chosen = {name: entry for name, entry in entries.items() if "rounding" in entry}
    found = choose_integers(graph, original, chosen, task, samples, biases) if chosen else {}
    graph.recompile()
    return found
