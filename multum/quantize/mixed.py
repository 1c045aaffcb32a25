"""`Mixed`: each weight has the bits that the outputs ask for, under a budget of bits for all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..errors import StepError
from ..graph import Graph, Layer
from ..step import Plan, Stage, Step, option
from ..task import Task, calibration, call, tensors
from .bias import correct_biases
from .grid import Grid, quantize, signed
from .insert import weight_scale
from .weight_only import ROUNDING, check_rounding, choose, round_weights, weight_entries

BITS = (2, 3, 4, 5, 6, 8)
# Bits up to which the error is measured; it falls by four with each further one (Bennett 1948, "Spectra of quantized signals").
_MEASURED = 4


@dataclass(frozen=True)
class Mixed(Step):
    """Rounds weights to 2 to 8 bits each, as many on average as asked for, where they keep the outputs best.

    Each weight alone is rounded and the error of the outputs measured (as in Cai et al. 2020, "ZeroQ", section 3.3, with the squared error
    in place of the divergence, so that any outputs will do); then bits go, one layer at a time, where they save most error for each bit
    of the file. Errors of different layers are taken to add up.
    """

    stage: ClassVar[Stage | None] = Stage.NUMBERS
    needs: ClassVar[tuple[str, ...]] = ("calibration",)

    bits: float = option(4.0, "bits of a weight, on average over all that are rounded; 2 to 8")
    rounding: str = option("auto", ROUNDING)
    samples: int = option(256, "calibration samples that are looked at when data choose the integers")
    trials: int = option(32, "calibration samples on which each layer is tried")
    include: str | tuple[str, ...] = option("*", "glob patterns of layers")
    exclude: str | tuple[str, ...] = option((), "glob patterns of layers to leave in float")

    def __post_init__(self) -> None:
        if not BITS[0] <= self.bits <= BITS[-1]:
            raise StepError(f"quantize.Mixed: bits is {self.bits!r}.", f"a number from {BITS[0]} to {BITS[-1]}")
        if min(self.samples, self.trials) < 1:
            raise StepError(f"quantize.Mixed: samples is {self.samples}, trials {self.trials}.", "at least 1 each")
        check_rounding(self.rounding)

    def plan(self, graph: Graph, task: Task) -> Plan:
        graph = graph.copy().eval()
        chosen, skipped = choose(graph, self.include, self.exclude)
        skipped |= {layer.name: "its weight is quantized already" for layer in chosen if layer.quantizer()}
        chosen = [layer for layer in chosen if not layer.quantizer()]
        owners = {layer.weight: layer for layer in reversed(chosen)}
        errors = measure(graph, list(owners.values()), task, self.trials)
        bits = allot(errors, {name: graph.tensor(name).numel() for name in owners}, self.bits)
        changes = {
            layer.name: entry | {"errors": {str(b): errors[layer.weight][b] for b in BITS}}
            for layer, entry in weight_entries(chosen, bits, BITS[0], self.rounding)
        }
        return Plan(changes, skipped)

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        original = graph.copy()
        found = round_weights(graph, original, plan, task, self.samples)
        return {"rounding": found, "bias_shifts": correct_biases(graph, original, found, task, self.samples)}


@torch.inference_mode()
def measure(graph: Graph, owners: list[Layer], task: Task, samples: int) -> dict[str, dict[int, float]]:
    """By weight and bits the squared error of the outputs, relative to their square, when that weight alone is rounded to nearest."""
    grids = {bits: signed(bits) for bits in BITS if bits <= _MEASURED}
    cases: list[tuple[str, int, Grid, torch.Tensor]] = []
    for layer in owners:
        for bits in grids:
            grid = signed(bits, layer.scale_axis)
            cases.append((layer.weight, bits, grid, weight_scale(graph.tensor(layer.weight), grid)))
    wrong, whole = dict.fromkeys(((name, bits) for name, bits, *_ in cases), 0.0), 0.0
    for inputs in calibration(task, samples):
        right = [value for value in tensors(call(graph, inputs)) if value.is_floating_point()]
        whole += sum(float(value.double().square().sum()) for value in right)
        for name, bits, grid, scale in cases:
            kept = graph.tensor(name).detach()
            graph.set_tensor(name, quantize(kept, scale, torch.zeros_like(scale), grid))
            seen = [value for value in tensors(call(graph, inputs)) if value.is_floating_point()]
            graph.set_tensor(name, kept)
            wrong[name, bits] += sum(float((a - b).double().square().sum()) for a, b in zip(seen, right, strict=True))
    found: dict[str, dict[int, float]] = {layer.weight: {} for layer in owners}
    for (name, bits), error in wrong.items():
        found[name][bits] = error / max(whole, 1e-30)
    for curve in found.values():
        least = curve[max(curve)]
        curve |= {bits: least / 4.0 ** (bits - _MEASURED) for bits in BITS if bits > _MEASURED}
    return found


def allot(errors: dict[str, dict[int, float]], sizes: dict[str, int], average: float) -> dict[str, int]:
    """Bits for each weight, `average` of them at the most: from the fewest, the step that saves most error for its bits comes first."""
    bits = dict.fromkeys(errors, BITS[0])
    left = (average - BITS[0]) * sum(sizes.values())
    while True:
        steps = [
            ((errors[name][now] - errors[name][more]) / (sizes[name] * (more - now)), name, more)
            for name, now in bits.items()
            for more in BITS
            if more > now and sizes[name] * (more - now) <= left
        ]
        gain, name, more = max(steps, default=(0.0, "", 0))
        if not gain > 0:
            return bits
        left -= sizes[name] * (more - bits[name])
        bits[name] = more
