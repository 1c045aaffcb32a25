"""Whole layers set to zero: every other one, or those that are named."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import fx

from ..errors import StepError
from ..graph import Graph, layers
from ..step import Plan, Stage, Step, option
from ..task import Task
from .masks import mask, maskable
from .obs import Choice


@dataclass(frozen=True)
class Layers(Step):
    """Sets all weights of every other layer to zero, for good; with `every=1` of all that are named.

    A layer through which alone the inputs reach an output stays. With calibration data the biases of the others, and the statistics of
    batch norms, take over the mean of what is missing. Files get smaller; to save time as well take blocks out: `prune.Blocks`.
    """

    stage: ClassVar[Stage | None] = Stage.VALUES

    every: int = option(2, "of the layers that can go every second, third ... does; 1: all")
    start: int = option(1, "the place of the first that goes, counted from 0")
    include: str | tuple[str, ...] = option("*", "glob patterns of layers")
    exclude: str | tuple[str, ...] = option((), "glob patterns of layers to leave whole")
    recover: bool = option(True, "let biases and batch norms make good the mean, when there are calibration data")
    samples: int = option(512, "samples that recovery looks at")

    def __post_init__(self) -> None:
        if self.every < 1 or self.start < 0:
            raise StepError(f"Every {self.every} of the layers from {self.start} on should go.", "every of at least 1, start of at least 0")
        if self.samples < 1:
            raise StepError(f"{self.samples} samples are asked for.", "at least 1, such as 512")

    def plan(self, graph: Graph, task: Task) -> Plan:
        chosen, skipped = maskable(graph, self.include, self.exclude)
        users: dict[str, set[fx.Node]] = {}
        for layer in layers(graph):
            users.setdefault(layer.weight, set()).add(layer.node)
        reached, gone = _reached(graph, ()), set[fx.Node]()
        changes, place = dict[str, dict[str, Any]](), 0
        for layer in chosen:
            if not (graph.tensor(layer.weight) != 0).any():
                skipped[layer.name] = "its weights are zero already"
            elif _reached(graph, users[layer.weight]) < reached:
                skipped[layer.name] = "without it an output would not depend on the inputs"
            else:
                turn, place = place >= self.start and (place - self.start) % self.every == 0, place + 1
                if not turn:
                    skipped[layer.name] = "it is not its turn"
                elif _reached(graph, gone | users[layer.weight]) < reached:
                    skipped[layer.name] = "without it and those before an output would not depend on the inputs"
                else:
                    gone |= users[layer.weight]
                    changes[layer.name] = {"zeros": graph.tensor(layer.weight).numel()}
        return Plan(changes, skipped)

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        whole = Choice(lambda scores, columns, part: torch.ones_like(scores, dtype=torch.bool))
        mask(graph, task, dict.fromkeys(plan.changes, whole), "l1", self.samples, self.recover and task.has("calibration"))
        return {}


def _reached(graph: Graph, without: Collection[fx.Node]) -> set[fx.Node]:
    """The outputs of the graph that its inputs reach on a way without these operators."""
    live: set[fx.Node] = set()
    for node in graph.fx.nodes:
        if node.op == "placeholder" or (node not in without and live & set(node.all_input_nodes)):
            live.add(node)
    return live & set(graph.fx.output_node().all_input_nodes)
