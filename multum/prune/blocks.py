"""Pruning of depth: whole residual branches are taken out."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

from torch import fx

from ..errors import StepError, near
from ..graph import Graph, layers
from ..graph.residual import Block, blocks, skip
from ..step import Plan, Stage, Step, option
from ..task import Task
from .deviation import Deviation
from .recover import inputs, least_squares, recover_judged

_ORDERS = ("change", "even", "alternate", "first", "last")


@dataclass(frozen=True)
class Blocks(Step):
    """Takes out the residual branches without which the outputs change least: x + f(x) becomes x.

    A branch is found in the operators: a sum one of whose sides depends on the other. By `change` they go one after the other, each time
    the one whose absence moves the outputs least on calibration data (as in Men et al. 2024, section 3, there by the change of the
    stream; Song et al. 2024, section 3.2, by that of the outputs). Even, alternate, first or last blocks need no data (Sajjad et al. 2023,
    section 3); `even` spreads what stays among branches with weights of the same shapes, so that whole layers of a transformer go. What
    follows is refitted when there are calibration data. A normalization after the sum goes along where that is better, for `even` always.
    """

    stage: ClassVar[Stage | None] = Stage.STRUCTURE

    ratio: float = option(0.25, "share of the blocks that is taken out, at least one")
    criterion: str | None = option(None, f"{', '.join(_ORDERS)}; change with calibration data, alternate without when not given")
    recover: bool = option(True, "let the layers that follow make good, when there are calibration data")
    samples: int = option(512, "samples that recovery looks at")
    judged: int = option(64, "samples on which the change of the outputs is measured")
    include: str | tuple[str, ...] = option("*", "glob patterns of blocks, named by the last layer of each")
    exclude: str | tuple[str, ...] = option((), "glob patterns of blocks that stay")

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise StepError(f"The share of blocks to take out is {self.ratio}.", "a ratio between 0 and 1, such as 0.25")
        if self.criterion is not None and self.criterion not in _ORDERS:
            raise StepError(f"There is no criterion {self.criterion!r}.", f"one of the criteria, such as {near(self.criterion, _ORDERS)}")
        if min(self.samples, self.judged) < 1:
            raise StepError(f"{min(self.samples, self.judged)} samples are asked for.", "at least 1, such as 64")

    def requires(self) -> tuple[str, ...]:
        return ("calibration",) if self.criterion == "change" else ()

    def plan(self, graph: Graph, task: Task) -> Plan:
        found = blocks(graph)
        chosen = self._chosen(found)
        count = max(1, round(self.ratio * len(chosen))) if chosen else 0
        criterion = self.criterion or ("change" if task.has("calibration") else "alternate")
        if criterion == "change" and chosen:
            changes = _cheapest(graph, chosen, count, Deviation(graph, inputs(task, self.judged, graph)))
        elif criterion == "even":
            changes = _even(graph, chosen, 1 - self.ratio)
        else:
            order = {"first": chosen, "last": chosen[::-1], "alternate": chosen[1::2] + chosen[::2]}.get(criterion, [])
            changes = {block.name: {"layers": list(block.layers), "end": "sum"} for block in order[:count]}
        gone = {name for change in changes.values() for name in change["layers"]}
        inside = {name: block for block in reversed(found) for name in block.layers}
        skipped = {layer.name: self._reason(inside.get(layer.name), chosen) for layer in layers(graph) if layer.name not in gone}
        return Plan(changes, skipped)

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        original = graph.copy()
        skip(graph, [(block, end_of(block, change["end"])) for block in blocks(graph) if (change := plan.changes.get(block.name))])
        if not (self.recover and task.has("calibration")):
            return {}
        return recover_judged(graph, original, (task, self.samples), {layer.name: least_squares for layer in layers(graph)})

    def _chosen(self, found: list[Block]) -> list[Block]:
        wanted, unwanted = ((p,) if isinstance(p, str) else tuple(p) for p in (self.include, self.exclude))
        for pattern in (*wanted, *unwanted):
            if pattern != "*" and not any(fnmatchcase(block.name, pattern) for block in found):
                raise StepError(f"The pattern {pattern!r} matches no block.", f"such as {near(pattern, [block.name for block in found])}")
        return [
            block
            for block in found
            if any(fnmatchcase(block.name, p) for p in wanted) and not any(fnmatchcase(block.name, p) for p in unwanted)
        ]

    def _reason(self, block: Block | None, chosen: list[Block]) -> str:
        if block is None:
            return "it is in no residual branch"
        return f"the block of {block.name} counts for more" if block in chosen else f"the block of {block.name} is excluded"


def _even(graph: Graph, chosen: list[Block], share: float) -> dict[str, dict[str, Any]]:
    """All but this share, evenly, of the blocks that are alike, of all if no two are; with the norms behind them where all have one."""
    weights = {layer.name: layer.weight for layer in layers(graph)}
    alike: dict[Any, list[Block]] = {}
    for block in chosen:
        alike.setdefault(tuple(graph.tensor(weights[name]).shape for name in block.layers), []).append(block)
    gone: dict[str, dict[str, Any]] = {}
    for members in alike.values() if len(alike) < len(chosen) else [chosen]:
        count = max(1, math.ceil(share * len(members) - 1e-9))
        kept = {place * len(members) // count for place in range(count)}
        end = "norm" if all(block.norm is not None for block in members) else "sum"
        gone |= {block.name: {"layers": list(block.layers), "end": end} for place, block in enumerate(members) if place not in kept}
    return {block.name: gone[block.name] for block in chosen if block.name in gone}


def end_of(block: Block, which: str) -> fx.Node:
    """What `skip` puts the block's input in the place of: its "sum", or the "norm" behind it."""
    return block.norm if which == "norm" and block.norm is not None else block.total


def _cheapest(graph: Graph, chosen: list[Block], count: int, deviation: Deviation) -> dict[str, dict[str, Any]]:
    """One block after the other, the one without which the outputs are off least; a block that lies in one that went is no more.

    What a block costs hardly shrinks as others go: only the first in line is measured anew.
    """
    order = {block.name: place for place, block in enumerate(blocks(graph))}
    gone: dict[str, dict[str, Any]] = {}

    def off(block: Block, end: str) -> float:
        trial, wanted = graph.copy(), {name: change["end"] for name, change in gone.items()} | {block.name: end}
        skip(trial, [(own, end_of(own, wanted[own.name])) for own in blocks(trial) if own.name in wanted])
        return deviation(trial)

    line = [(off(block, end), 0, order[block.name], end) for block in chosen for end in ("sum", *(["norm"] if block.norm else []))]
    heapq.heapify(line)
    named = {order[block.name]: block for block in chosen}
    while len(gone) < count and line:
        change, known, place, end = heapq.heappop(line)
        block = named[place]
        if any(set(block.layers) <= set(other["layers"]) for other in gone.values()):
            continue
        if known < len(gone):
            heapq.heappush(line, (off(block, end), len(gone), place, end))
            continue
        gone[block.name] = {"layers": list(block.layers), "end": end, "change": change}
    return {name: gone[name] for name in sorted(gone, key=order.__getitem__)}
