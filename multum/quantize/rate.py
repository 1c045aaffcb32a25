"""`RateDistortion`: weights on coarse, even grids, made for entropy coding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ..errors import StepError
from ..graph import Graph
from ..graph.layers import weight
from ..step import Plan, Stage, Step, option
from ..task import Task
from ..train import entropy
from .grid import SMALLEST_SCALE
from .levels import BITS, codable, code_layers
from .weight_only import check_bits, choose, round_weights, weight_entries

_ROUNDINGS = ("auto", "nearest", "coded")
LEVELS = 5  # bits of the grid, -15..15: at the rates asked for here, larger integers hardly occur
MOST = 4.0  # bits of entropy; beyond, the grid clips
_HALVINGS = 20


@dataclass(frozen=True)
class RateDistortion(Step):
    """Rounds the weights of each layer to multiples of one step size, chosen so that their integers have `bits` of entropy on average.

    An even grid with a coarse step, entropy coded, comes within a quarter of a bit of the best that any quantizer can do (Gish &
    Pierce 1968, section IV), and its outliers are exact; a grid of two or three levels has neither. The step sizes stay: a layer takes
    more or fewer bits by its weights growing or shrinking. At two bits and less training must follow; `distill.Logits(bits=...)` holds
    the entropy, or brings it down, while it recovers.

    With rounding "coded" every integer is chosen to minimise the error of the outputs plus lambda times its bits in its context, while the
    weights not yet chosen make up for it (Frantar et al. 2023, "GPTQ", section 3, with a rate term as in Wiedemann et al. 2020,
    "DeepCABAC", section III-C); all layers have one lambda, from which their steps follow (reverse water-filling). That is for files that
    are used as they are: at 1.3 bits a ResNet-20 needs no training any more. `edges` then has no say.
    """

    stage: ClassVar[Stage | None] = Stage.NUMBERS

    bits: float = option(2.5, "entropy of the integers, bits per weight")
    edges: int = option(8, "bits of a weight of the first and the last layer")
    rounding: str = option("auto", "nearest; coded: from data; auto: coded if there are calibration data, else nearest")
    samples: int = option(512, "calibration samples that are looked at when data choose the integers")
    include: str | tuple[str, ...] = option("*", "glob patterns of layers")
    exclude: str | tuple[str, ...] = option((), "glob patterns of layers to leave in float")

    def __post_init__(self) -> None:
        if not 0 < self.bits <= MOST:
            raise StepError(f"quantize.RateDistortion: bits is {self.bits!r}.", f"a number above 0, at most {MOST}")
        check_bits(self.edges)
        if self.rounding not in _ROUNDINGS:
            raise StepError(f"quantize.RateDistortion: rounding is {self.rounding!r}.", f"one of {', '.join(_ROUNDINGS)}")

    def plan(self, graph: Graph, task: Task) -> Plan:
        chosen, skipped = choose(graph, self.include, self.exclude)
        entries = {layer: entry for layer, entry in weight_entries(chosen, LEVELS, self.edges) if entry}
        skipped |= {layer.name: "its weight is quantized already" for layer in chosen if layer not in entries}
        if self._coded(task):
            for layer, entry in entries.items():
                if codable(layer) and not any(layer.weight == other.weight and not codable(other) for other in chosen):
                    entry["weight"] = {"bits": BITS, "axis": layer.scale_axis, "rounding": "coded"}
        coarse = {layer.weight: weight(graph, layer) for layer, entry in entries.items() if entry["weight"]["bits"] == LEVELS}
        step = _step(list(coarse.values()), self.bits) if coarse else 0.0
        for layer, entry in entries.items():
            if layer.weight in coarse:
                entry["weight"]["scale"] = step * _size(weight(graph, layer))
        return Plan({layer.name: entry for layer, entry in entries.items()}, skipped)

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        coded = [name for name, change in plan.changes.items() if "rounding" in change["weight"]]
        original = graph.copy() if coded else graph
        round_weights(graph, graph, Plan({name: plan.changes[name] for name in plan.changes if name not in coded}), task, 0)
        return code_layers(graph, original, coded, task, self.samples, self.bits) if coded else {}

    def _coded(self, task: Task) -> bool:
        """Whether data choose the integers. Raises StepError when they are asked to and there are none."""
        has_data = task.has("calibration")
        if self.rounding == "coded" and not has_data:
            given = f"quantize.RateDistortion: the rounding 'coded' looks at data, of which the task {task.name!r} has none."
            raise StepError(given, "Task(..., calibration=...)")
        return has_data and self.rounding != "nearest"


def _size(values: Tensor) -> float:
    """The root mean square, never zero."""
    return max(float(values.detach().square().mean().sqrt()), SMALLEST_SCALE)


def _step(tensors: list[Tensor], bits: float) -> float:
    """The step size, in root mean squares of each tensor, at which their integers have `bits` of entropy on average."""
    low, high = 2.0**-6, 2.0**6  # from more bits than the grid has to none
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _entropy(tensors, middle) > bits else (low, middle)
    return high


def _entropy(tensors: list[Tensor], step: float) -> float:
    bits = [values.numel() * float(entropy((values.detach() / (step * _size(values))).round())) for values in tensors]
    return sum(bits) / sum(values.numel() for values in tensors)
