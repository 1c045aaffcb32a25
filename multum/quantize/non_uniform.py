"""`NonUniform` and `FixedPoint`: weights on grids that are not evenly spaced, or whose steps are powers of two. No data needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import StepError
from ..graph import Graph, Layer, layers
from ..step import Plan, Stage, Step, option
from ..task import Task
from .grid import signed
from .insert import quantize_weight
from .uneven import FIXED, GRIDS, PLACES, fitted, fixed_point, integers, nearest, power_scale, quantiles
from .weight_only import check_bits, choose

_MOST = {"normal": 6, "power": 4, "additive": 5, "quantile": 6}  # bits up to which the integers to 127 hold the grid


@dataclass(frozen=True)
class NonUniform(Step):
    """Rounds weights to a grid that has more values where weights are many, with a scale per output channel. Needs no data.

    `normal`: quantiles of the normal distribution, at 4 bits NF4 (Dettmers et al. 2023, section 3); `quantile`: those of the layer's own
    weights; `power`: powers of two; `additive`: sums of them (Li et al. 2020, section 2.2). Values are moved to integers up to 127, so
    integer kernels and quantize.Static after it take them as 8-bit weights; training after it would leave the grid.
    """

    stage: ClassVar[Stage | None] = Stage.NUMBERS

    grid: str = option("normal", f"one of {', '.join(GRIDS)}")
    bits: int = option(4, f"of a weight, from 2 to {', '.join(f'{most} ({grid})' for grid, most in _MOST.items())}")
    include: str | tuple[str, ...] = option("*", "glob patterns of layers")
    exclude: str | tuple[str, ...] = option((), "glob patterns of layers to leave in float")

    def __post_init__(self) -> None:
        if self.grid not in GRIDS:
            raise StepError(f"quantize.NonUniform: grid is {self.grid!r}.", f"one of {', '.join(GRIDS)}")
        if not 2 <= self.bits <= _MOST[self.grid]:
            raise StepError(f"quantize.NonUniform: {self.bits} bits of the grid {self.grid!r}.", f"2 to {_MOST[self.grid]} bits")

    def plan(self, graph: Graph, task: Task) -> Plan:
        return _plan(graph, self.include, self.exclude, {"grid": self.grid, "bits": self.bits})

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        errors = {}
        for layer, weight in _owned(graph, plan):
            codes = integers(FIXED[self.grid](self.bits) if self.grid in FIXED else quantiles(weight, self.bits)).to(weight)
            scale = fitted(weight, codes, layer.scale_axis)
            wide = signed(8, layer.scale_axis).broadcast(scale, weight.ndim)
            errors[layer.name] = _put(graph, layer, weight, wide * nearest(weight / wide, codes), 8, scale)
        graph.recompile()
        return {"errors": errors}


@dataclass(frozen=True)
class FixedPoint(Step):
    """Rounds weights to fixed-point numbers: integers times a power of two, one for each output channel. Needs no data."""

    stage: ClassVar[Stage | None] = Stage.NUMBERS

    bits: int = option(8, "of a weight with its sign, 2 to 8")
    rounding: str = option("nearest", f"one of {', '.join(PLACES)}")
    include: str | tuple[str, ...] = option("*", "glob patterns of layers")
    exclude: str | tuple[str, ...] = option((), "glob patterns of layers to leave in float")

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.rounding not in PLACES:
            raise StepError(f"quantize.FixedPoint: rounding is {self.rounding!r}.", f"one of {', '.join(PLACES)}")

    def plan(self, graph: Graph, task: Task) -> Plan:
        return _plan(graph, self.include, self.exclude, {"bits": self.bits, "rounding": self.rounding})

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        errors = {}
        for layer, weight in _owned(graph, plan):
            grid, random = signed(self.bits, layer.scale_axis), torch.Generator(weight.device).manual_seed(task.seed)
            scale = power_scale(weight, grid)
            rounded = fixed_point(weight, grid.broadcast(scale, weight.ndim), grid, self.rounding, random)
            errors[layer.name] = _put(graph, layer, weight, rounded, self.bits, scale)
        graph.recompile()
        return {"errors": errors}


def _plan(graph: Graph, include: str | tuple[str, ...], exclude: str | tuple[str, ...], entry: dict[str, Any]) -> Plan:
    chosen, skipped = choose(graph, include, exclude)
    skipped |= {layer.name: "its weight is quantized already" for layer in chosen if layer.quantizer()}
    return Plan({layer.name: {"weight": entry} for layer in chosen if layer.name not in skipped}, skipped)


def _owned(graph: Graph, plan: Plan) -> Iterator[tuple[Layer, Tensor]]:
    """Each weight of the plan once, with the first layer that reads it."""
    done = set[str]()
    for layer in layers(graph):
        if layer.name in plan.changes and layer.weight not in done:
            done.add(layer.weight)
            yield layer, graph.tensor(layer.weight).detach()


def _put(graph: Graph, layer: Layer, weight: Tensor, rounded: Tensor, bits: int, scale: Tensor) -> float:
    """Stores a weight that lies on its grid; its squared error, relative to its square."""
    error = float((rounded - weight).square().sum() / weight.square().sum().clamp_min(1e-30))
    quantize_weight(graph, layer, bits, scale)
    graph.set_tensor(layer.weight, rounded)
    return error
