"""`Aware`: quantization-aware training, for weights and activations of few bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import fx

from ..errors import StepError
from ..graph import Graph, Layer, layers
from ..graph.fuse import fuse
from ..graph.layers import source
from ..graph.matrix import data
from ..graph.model import aten, read
from ..step import Plan, Stage, Step, option
from ..task import Task
from ..train import OPTIMIZER, Training
from ..train.teacher import ALPHA, TEMPERATURE, recover
from .bias import settle_biases
from .grid import Grid, signed, unsigned
from .insert import check_activations, following
from .midrise import Midrise
from .observers import OBSERVERS, observe
from .weight_only import ROUNDING, check_bits, check_rounding, choose, round_weights, weight_entries

_LEARNED = aten._fake_quantize_learnable_per_tensor_affine.default
_PLAIN = aten.fake_quantize_per_tensor_affine.tensor_qparams
_MIDRISE = 2  # bits up to which four values without a zero lose less than three with one
RANGES = ("lsq", "pact", "fixed")


@dataclass(frozen=True)
class Aware(Step):
    """Puts weights and the inputs of layers on grids and trains toward the original; gradients pass the rounding straight through.

    Scales of weights learn. Ranges of activations: `lsq`, their scale learns (Esser et al. 2020, "Learned step size quantization",
    section 2); `pact`, the bound at which they are clipped learns, from the values that it clips (Choi et al. 2018, "PACT", section 3);
    `fixed`, they stay as measured (Bengio et al. 2013). Batch normalization takes part in the training and is folded into the scales
    after it. Weights that are quantized already keep their grid, and zeros of pruned ones stay.
    """

    stage: ClassVar[Stage | None] = Stage.NUMBERS
    needs: ClassVar[tuple[str, ...]] = ("train", "calibration")

    weight_bits: int = option(4, "bits of a weight, 2 to 8")
    activation_bits: int = option(4, "bits of an activation, 2 to 8")
    edges: int = option(8, "least bits of the first and the last layer: weights and inputs")
    ranges: str = option("lsq", "how ranges of activations come about: lsq, pact or fixed")
    epochs: float = option(1.0, "passes over the training data")
    learning_rate: float | None = option(None, "highest learning rate; found from the graph when not given")
    optimizer: str = option("adamw", OPTIMIZER)
    rounding: str = option("auto", ROUNDING)
    samples: int = option(256, "calibration samples that are looked at")
    include: str | tuple[str, ...] = option("*", "glob patterns of layers")
    exclude: str | tuple[str, ...] = option((), "glob patterns of layers to leave in float")

    def __post_init__(self) -> None:
        check_bits(self.weight_bits, self.activation_bits, self.edges)
        check_rounding(self.rounding)
        Training(optimizer=self.optimizer)  # which refuses what it does not know
        if self.ranges not in RANGES:
            raise StepError(f"quantize.Aware: ranges is {self.ranges!r}.", f"one of {', '.join(RANGES)}")
        if self.samples < 1 or not self.epochs > 0:
            raise StepError(f"quantize.Aware: samples is {self.samples}, epochs {self.epochs}.", "at least 1 sample, and epochs above 0")

    def plan(self, graph: Graph, task: Task) -> Plan:
        check_activations(graph)
        chosen, skipped = choose(graph, self.include, self.exclude)
        changes = {layer.name: entry for layer, entry in weight_entries(chosen, self.weight_bits, self.edges, self.rounding)}
        for layer in chosen:
            if (entry := changes[layer.name].get("weight")) and entry["bits"] <= _MIDRISE and layer.weight not in graph.sparse:
                changes[layer.name]["weight"] = {"bits": entry["bits"], "axis": entry["axis"], "values": "odd integers"}
        places = _inputs(chosen)
        histograms = observe(graph, places, task, self.samples)
        ends = {layer.node for layer in (chosen[:1] + chosen[-1:])}
        for value, readers in places.items():
            bits = max(self.activation_bits, self.edges) if ends & {layer.node for layer in readers} else self.activation_bits
            grid, histogram = _grid(bits, histograms[value].low), histograms[value]
            low, high = OBSERVERS["mse"](histogram, grid)
            scale = max(high / grid.high, low / grid.low if grid.low else 0.0, 1e-12)
            entry = {"value": value.name, "bits": bits, "low": grid.low, "high": grid.high, "scale": scale}
            for layer in readers:
                changes[layer.name]["input"] = entry
        skipped |= {
            name: "its weight is quantized already and it has no input to quantize" for name, change in changes.items() if not change
        }
        return Plan({name: change for name, change in changes.items() if change}, skipped)

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        weights = {name: change for name, change in plan.changes.items() if "weight" in change}
        odd = [layer for layer in layers(graph) if "values" in weights.get(layer.name, {}).get("weight", ())]
        even = Plan({name: change for name, change in weights.items() if "values" not in change["weight"]})
        measured: dict[str, Any] = {"rounding": round_weights(graph, graph.copy(), even, task, self.samples, biases=False)}
        midrise = [Midrise(odd, self.weight_bits)] if odd else []
        for companion in midrise:
            companion.quantize(graph)
        entries = {change["input"]["value"]: change["input"] for change in plan.changes.values() if "input" in change}
        for value, readers in _inputs(choose(graph, self.include, self.exclude)[0]).items():
            if value.name in entries:
                self._quantize(graph, value, [layer.node for layer in readers], entries[value.name])
        graph.recompile()
        how = Training.of(graph, self.learning_rate, self.optimizer, epochs=self.epochs)
        graph.requires_grad_(True)
        measured |= recover(graph, task, how, workdir, midrise, TEMPERATURE, ALPHA)
        for companion in midrise:
            companion.settle(graph)
        _settle(graph)
        fuse(graph)
        settle_biases(graph)
        return measured

    def _quantize(self, graph: Graph, value: fx.Node, readers: list[fx.Node], entry: dict[str, Any]) -> None:
        """Puts a quantizer between a value and the layers that read it."""
        device = next(iter(graph.parameters())).device
        low, high, scale = entry["low"], entry["high"], entry["scale"]
        ranges = "fixed" if self.ranges == "pact" and low else self.ranges  # PACT has no bound for negative values
        part, size = ("bound", scale * high) if ranges == "pact" else ("scale", scale)
        names = [f"activations.{value.name}.{part}", f"activations.{value.name}.zero_point"]
        graph.set_tensor(names[0], torch.full((1,), size, device=device), parameter=ranges != "fixed")
        graph.set_tensor(names[1], torch.zeros(1, dtype=torch.float32 if ranges == "lsq" else torch.int32, device=device))
        after = following(graph, value)
        step, zero = (graph.attribute(name, after) for name in names)
        if ranges == "lsq":
            factor = 1 / math.sqrt(max(1, value.meta["val"][:1].numel()) * high)
            quantizer = graph.operator(_LEARNED, (value, step, zero, low, high, factor), value, after)
        else:
            clipped = value
            if ranges == "pact":  # the bound learns from what it clips alone
                clipped = graph.operator(aten.minimum.default, (value, step), value, after)
                shared = graph.operator(aten.div.Tensor, (step, high), step, after)
                step = graph.operator(aten.detach.default, (shared,), step, after)
            quantizer = graph.operator(_PLAIN, (clipped, step, zero, low, high), value, after)
        for reader in readers:
            reader.replace_input_with(value, quantizer)


def _inputs(chosen: list[Layer]) -> dict[fx.Node, list[Layer]]:
    """The values that layers read, each with its readers."""
    found: dict[fx.Node, list[Layer]] = {}
    for layer in chosen:
        if layer.kind in ("conv", "linear") and data(layer).op != "get_attr":
            found.setdefault(data(layer), []).append(layer)
    return found


def _grid(bits: int, low: float) -> Grid:
    """Integers from 0 on for values that are never negative, as many negative as positive ones for others."""
    return unsigned(bits) if low >= 0 else signed(bits)


@torch.no_grad()
def _settle(graph: Graph) -> None:
    """What was trained becomes scales that are stored, and quantizers those that every export knows."""
    for node in graph.find(_LEARNED, _PLAIN):
        value, (step, zero) = node.all_input_nodes[0], (read(node, name) for name in ("scale", "zero_point"))
        low, high = int(read(node, "quant_min")), int(read(node, "quant_max"))
        if source(value) is not None:
            continue
        name = str(zero.target).removesuffix(".zero_point")
        if bounded := step.op != "get_attr":
            value = value.all_input_nodes[0]
        scale = graph.tensor(f"{name}.bound") / high if bounded else graph.tensor(f"{name}.scale")
        zero_point = torch.zeros((), dtype=torch.int32, device=scale.device)
        graph.set_tensor(f"{name}.zero_point", zero_point, parameter=False)
        graph.set_tensor(f"{name}.scale", scale.detach().reshape(()).clone(), parameter=False)
        reads = [graph.attribute(f"{name}.{part}", node) for part in ("scale", "zero_point")]
        plain = graph.operator(_PLAIN, (value, *reads, low, high), node, node)
        node.replace_all_uses_with(plain)
    graph.clean()
