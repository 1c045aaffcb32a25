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
from .weight_only import check_bits, choose, round_weights, weight_entries

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
    """

    stage: ClassVar[Stage | None] = Stage.NUMBERS

    bits: float = option(2.5, "entropy of the integers, bits per weight")
    edges: int = option(8, "bits of a weight of the first and the last layer")
    include: str | tuple[str, ...] = option("*", "glob patterns of layers")
    exclude: str | tuple[str, ...] = option((), "glob patterns of layers to leave in float")

    def __post_init__(self) -> None:
        if not 0 < self.bits <= MOST:
            raise StepError(f"quantize.RateDistortion: bits is {self.bits!r}.", f"a number above 0, at most {MOST}")
        check_bits(self.edges)

    def plan(self, graph: Graph, task: Task) -> Plan:
        chosen, skipped = choose(graph, self.include, self.exclude)
        entries = {layer: entry for layer, entry in weight_entries(chosen, LEVELS, self.edges) if entry}
        skipped |= {layer.name: "its weight is quantized already" for layer in chosen if layer not in entries}
        coarse = {layer.weight: weight(graph, layer) for layer, entry in entries.items() if entry["weight"]["bits"] == LEVELS}
        step = _step(list(coarse.values()), self.bits) if coarse else 0.0
        for layer, entry in entries.items():
            if layer.weight in coarse:
                entry["weight"]["scale"] = step * _size(weight(graph, layer))
        return Plan({layer.name: entry for layer, entry in entries.items()}, skipped)

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        round_weights(graph, graph, plan, task, 0)
        return {}


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
