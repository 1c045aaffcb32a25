"""A weight as two thin factors and a residual of few bits."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..errors import StepError
from ..graph import Graph, Layer, layers, select
from ..graph.matrix import data
from ..graph.model import aten
from ..quantize.grid import quantize, signed
from ..quantize.insert import weight_scale
from ..quantize.weight_only import WeightOnly, check_bits
from ..step import Plan, Stage, Step, option
from ..task import Task
from .chain import Link, Writer, composed, run
from .given import Given
from .method import missed, unfit
from .svd import SVD


@dataclass(frozen=True)
class Quantized(Step):
    """Writes a weight as L R + Q: factors of a low rank in float, and a residual Q of few bits (Guo et al. 2024, "LQ-LoRA", section 3).

    In turns the factors are fitted to what Q leaves and Q rounds what the factors leave (Li et al. 2024, "LoftQ", algorithm 1); the best
    turn counts. With calibration data the factors are the best for the layer's outputs, and data choose the integers as in
    `quantize.WeightOnly`. The factors run beside the layer, so it gets smaller, not faster; all of it trains. Against integers alone it
    pays at two or three bits.
    """

    stage: ClassVar[Stage | None] = Stage.NUMBERS

    rank: int = option(8, "of the factors, at least 1")
    bits: int = option(3, "of the residual, 2 to 8")
    rounds: int = option(5, "of fitting and rounding, at least 1")
    samples: int = option(256, "calibration samples, where there are any, whose outputs are kept; 0: look at the weights alone")
    include: str | tuple[str, ...] = option("*", "glob patterns of layers")
    exclude: str | tuple[str, ...] = option((), "glob patterns of layers to leave as they are")

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.rank < 1 or self.rounds < 1 or self.samples < 0:
            numbers = f"rank is {self.rank}, rounds {self.rounds}, samples {self.samples}"
            raise StepError(f"factorize.Quantized: {numbers}.", "a rank and rounds of at least 1, samples of at least 0")

    def plan(self, graph: Graph, task: Task) -> Plan:
        changes, skipped, given = dict[str, dict[str, Any]](), dict[str, str](), Given(graph, task, self.samples)
        uses = Counter(layer.weight for layer in layers(graph))
        for layer in select(graph, self.include, self.exclude, SVD.kinds):
            reason = "it shares its weight" if uses[layer.weight] > 1 else unfit(graph, layer)
            count = graph.tensor(layer.weight).numel()
            sides = [len(graph.tensor(layer.weight)), count // len(graph.tensor(layer.weight))]
            spent = self.bits * count + 32 * self.rank * sum(sides)
            if reason is None and self.rank > min(sides):
                reason = f"the rank {self.rank} is above its full rank {min(sides)}"
            if reason is None and spent >= 32 * count:
                reason = f"factors of rank {self.rank} and {self.bits} bits cost no less"
            if reason:
                skipped[layer.name] = reason
                continue
            weight, second = given(layer)
            low, alone = self._low(layer, weight, second)
            entry = {"bits": spent / count, "missed": missed(weight, self._sum(layer, weight, low), second), "alone": alone}
            if entry["missed"] >= alone:
                skipped[layer.name] = f"with factors it misses {entry['missed']:.2g} of its energy, with integers alone {alone:.2g}"
            else:
                changes[layer.name] = {"rank": self.rank, "residual": self.bits, **entry}
        return Plan(changes, skipped)

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        given, made = Given(graph, task, self.samples), list[tuple[Layer, Tensor, list[Link]]]()
        for layer in [layer for layer in layers(graph) if layer.name in plan.changes]:
            weight, second = given(layer)
            links, _ = self._low(layer, weight, second)
            rest = weight - composed(links, weight.shape)
            made.append((layer, rest.movedim(0, layer.axis), links))
        for layer, rest, links in made:
            graph.set_tensor(layer.weight, rest.to(graph.tensor(layer.weight).dtype).contiguous())
            _beside(graph, layer, links)
        names = tuple(layer.name for layer, _, _ in made)
        rounding = WeightOnly(self.bits, self.bits, "auto" if self.samples else "nearest", max(1, self.samples), names)
        return rounding.apply(graph, rounding.plan(graph, task), task, workdir)

    def _low(self, layer: Layer, weight: Tensor, second: Tensor | None) -> tuple[list[Link], float]:
        """The factors, and what is missed without them."""
        best, least = list[Link](), float("inf")
        rounded = torch.zeros_like(weight)
        for _ in range(self.rounds):
            links = SVD().links(layer, weight - rounded, second, [self.rank])
            rounded = self._rounded(layer, weight - composed(links, weight.shape))
            off = missed(weight, rounded + composed(links, weight.shape), second)
            if off < least:
                best, least = links, off
        return best, missed(weight, self._rounded(layer, weight), second)

    def _sum(self, layer: Layer, weight: Tensor, links: list[Link]) -> Tensor:
        low = composed(links, weight.shape)
        return low + self._rounded(layer, weight - low)

    def _rounded(self, layer: Layer, weight: Tensor) -> Tensor:
        grid = signed(self.bits, 1 if layer.kind == "embedding" else 0)
        scale = weight_scale(weight.float(), grid).double()
        return quantize(weight, scale, torch.zeros_like(scale), grid)


def _beside(graph: Graph, layer: Layer, links: list[Link]) -> None:
    """The result of the chain is added to that of the layer."""
    write = Writer(graph, layer, after=True)
    value = layer.node.args[1] if layer.kind == "embedding" else data(layer)
    users = list(layer.node.users)
    assert isinstance(value, fx.Node)
    total = write.call(aten.add.Tensor, layer.node, run(write, value, None, links))
    for user in users:
        user.replace_input_with(layer.node, total)
    with torch.no_grad():
        graph.recompile()
        graph.refresh()
