"""`Static`: integer weights and activations, the ranges of the activations measured on calibration data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..errors import StepError
from ..graph import Graph, Layer
from ..graph.fuse import fuse
from ..step import Plan, Stage, Step, option
from ..task import Task
from .bias import correct_biases, settle_biases
from .fallback import WHOLE, Choice, choice_of, within
from .grid import Grid, affine, full_scale, signed
from .insert import check_activations, quantize_values
from .observers import OBSERVERS, importances, observe
from .placement import FLOAT, Placement, place
from .weight_only import ROUNDING, check_bits, check_rounding, choose, round_weights, weight_entries


@dataclass(frozen=True)
class Static(Step):
    """Weights and activations as integers, for integer kernels: about four times smaller and faster. Training can follow.

    Weights are symmetric with a scale per output channel (Krishnamoorthi 2018, section 3), activations asymmetric with one scale;
    `signed` and `per_channel` are for engines and processors on which other integers are faster. Which activations are quantized is
    decided from the graph, see `placement.py`.
    `max_drop` is in points of the score on validation data; without such, of agreement with the network before on calibration data.
    """

    stage: ClassVar[Stage | None] = Stage.NUMBERS
    needs: ClassVar[tuple[str, ...]] = ("calibration",)

    weight_bits: int = option(8, "bits of a weight, 2 to 8")
    activation_bits: int = option(8, "bits of an activation, 2 to 8")
    edges: int = option(8, "least bits of the weights of the first and the last layer")
    observer: str = option("mse", f"how ranges are found: {', '.join(OBSERVERS)}")
    samples: int = option(256, "calibration samples that are looked at")
    rounding: str = option("auto", ROUNDING)
    signed: bool = option(False, "activations as signed integers (s8s8) in the place of unsigned ones (u8s8)")
    per_channel: bool = option(True, "a scale for each output channel of a weight that is rounded to nearest; else one for all")
    bias_correction: bool = option(True, "shift biases so that rounding leaves the mean outputs as they were")
    max_drop: float | None = option(None, "points that may be lost; beyond, it repairs, raises bits, keeps layers in float")
    include: str | tuple[str, ...] = option("*", "glob patterns of layers")
    exclude: str | tuple[str, ...] = option((), "glob patterns of layers to leave in float")

    def __post_init__(self) -> None:
        check_bits(self.weight_bits, self.edges, self.activation_bits)
        check_rounding(self.rounding)
        if self.observer not in OBSERVERS:
            raise StepError(f"quantize.Static: observer is {self.observer!r}.", f"one of {', '.join(OBSERVERS)}")
        if self.samples < 1 or (self.max_drop is not None and self.max_drop < 0):
            raise StepError(f"quantize.Static: samples is {self.samples}, max_drop {self.max_drop}.", "at least 1 sample, no drop below 0")

    def plan(self, graph: Graph, task: Task) -> Plan:
        if self.max_drop is None:
            return self._plan(graph.copy(), task, Choice())

        def ready(choice: Choice, plan: Plan | None = None) -> Graph:
            made = graph.copy()
            self._prepare(made, task, choice) if plan is None else self._apply(made, plan, task, choice)
            return made

        return within(self.max_drop, graph, task, ready, lambda choice: self._plan(graph.copy(), task, choice), ready)

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        return self._apply(graph, plan, task, choice_of(plan))

    def _plan(self, graph: Graph, task: Task, choice: Choice) -> Plan:
        chosen, skipped, placement = self._prepare(graph, task, choice)
        below = 1 << self.activation_bits - 1 if self.signed else 0  # zero points move as the integers do
        grid, roots = Grid(-below, (1 << self.activation_bits) - 1 - below), {value: placement.root(value) for value in placement.readers}
        importance = importances(graph, roots, chosen) if self.observer == "weighted" else None
        histograms = observe(graph, roots, task, self.samples, importance)
        parameters = {}
        for root in dict.fromkeys(roots.values()):
            ranges = [OBSERVERS[self.observer](histograms[value], grid) for value in roots if roots[value] is root]
            scale, zero = affine(min(low for low, _ in ranges), max(high for _, high in ranges), grid)
            sufficed = max(histograms[value].sufficed for value in roots if roots[value] is root)
            parameters[root] = {
                "value": root.name, "bits": self.activation_bits, "low": grid.low, "high": grid.high, "scale": scale, "zero_point": zero,
                "samples_sufficed": sufficed,
            }  # fmt: skip
        raised = {layer.weight for layer in chosen if layer.name in choice.raised}
        bits = {layer.weight: max(self.weight_bits, WHOLE if layer.weight in raised else 0) for layer in chosen}
        weights = weight_entries(chosen, bits, self.edges, self.rounding)
        for layer, entry in weights if not self.per_channel else ():
            if "weight" in entry and "rounding" not in entry["weight"]:
                entry["weight"]["scale"] = float(full_scale(graph.tensor(layer.weight), signed(entry["weight"]["bits"])))
        changes = _changes(chosen, placement, parameters, weights)
        skipped |= {name: "its weight is quantized already" for name, change in changes.items() if not change}
        skipped |= dict.fromkeys(choice.kept, "stays in float: quantized, it lost too much")
        multiplied = {layer.node for layer in chosen if layer.kind in ("conv", "linear")}
        kept = [node.name for node in graph.find(*FLOAT) if node not in multiplied]
        skipped |= dict.fromkeys(kept, "stays in float: engines have no integer kernel for it")
        return Plan({name: change for name, change in changes.items() if change}, skipped)

    def _apply(self, graph: Graph, plan: Plan, task: Task, choice: Choice) -> dict[str, Any]:
        _, _, placement = self._prepare(graph, task, choice)
        original = graph.copy()
        entries = [entry for change in plan.changes.values() for entry in change.values() if "value" in entry]
        quantize_values(graph, placement, {entry["value"]: entry for entry in entries})
        measured: dict[str, Any] = {"rounding": round_weights(graph, original, plan, task, self.samples, self.bias_correction)}
        measured["samples_sufficed"] = max((entry["samples_sufficed"] for entry in entries), default=0)
        if self.bias_correction:
            measured["bias_shifts"] = correct_biases(graph, original, plan.changes, task, self.samples)
        settle_biases(graph)
        return measured

    def _prepare(self, graph: Graph, task: Task, choice: Choice) -> tuple[list[Layer], dict[str, str], Placement]:
        """Changes the float network into an equal one that is quantized well, and says what of it to quantize."""
        check_activations(graph)
        fuse(graph)
        choice.prepare(graph, task, self.samples)
        unwanted = (self.exclude,) if isinstance(self.exclude, str) else self.exclude
        chosen, skipped = choose(graph, self.include, (*unwanted, *choice.kept))
        return chosen, skipped, place(graph.fx, chosen)


def _changes(
    chosen: list[Layer], placement: Placement, parameters: dict[Any, dict[str, Any]], weights: list[tuple[Layer, dict[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """Layer by layer: weight, input and output; then, under the operator's name, values that belong to no layer."""
    changes = {layer.name: dict(entry) for layer, entry in weights}
    places = {layer.node: layer.name for layer in chosen}
    for value, readers in placement.readers.items():
        entry = parameters[placement.root(value)]
        inside = [places[reader] for reader in (value.users if readers is None else readers) if reader in places]
        for name in inside:
            changes[name]["input"] = entry
        if readers is None or not inside:
            name = places.get(placement.maker.get(value, value), value.name)
            changes.setdefault(name, {})["output"] = entry
    return changes
