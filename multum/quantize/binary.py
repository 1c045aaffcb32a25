"""`Binary`: weights of one bit, a sign times a scale for each output channel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..errors import StepError
from ..graph import Graph, layers
from ..graph.fuse import fuse
from ..step import Plan, Stage, Step, option
from ..task import Task
from ..train import OPTIMIZER, Training, default_rate, recover
from .midrise import Midrise
from .weight_only import check_bits, choose, round_weights, weight_entries


@dataclass(frozen=True)
class Binary(Step):
    """Trains the network toward the original with weights that are a sign times a scale for each output channel.

    The scale is the mean magnitude of the real weights behind the signs, which gradients reach straight through (Rastegari et al. 2016,
    "XNOR-Net", section 3.1; Courbariaux et al. 2015, "BinaryConnect", section 2). The first and the last layer, and tables of embeddings,
    keep `edges` bits. Activations stay in float: quantize.Static, or quantize.Aware, can follow.
    """

    stage: ClassVar[Stage | None] = Stage.NUMBERS
    needs: ClassVar[tuple[str, ...]] = ("train",)

    edges: int = option(8, "bits of a weight of the first and the last layer, and of embeddings")
    epochs: float = option(1.0, "passes over the training data")
    learning_rate: float | None = option(None, "highest learning rate; found from the graph when not given")
    optimizer: str = option("adamw", OPTIMIZER)
    include: str | tuple[str, ...] = option("*", "glob patterns of layers")
    exclude: str | tuple[str, ...] = option((), "glob patterns of layers to leave in float")

    def __post_init__(self) -> None:
        check_bits(self.edges)
        Training(optimizer=self.optimizer)  # which refuses what it does not know
        if not self.epochs > 0:
            raise StepError(f"quantize.Binary: epochs is {self.epochs}.", "a number above 0")

    def plan(self, graph: Graph, task: Task) -> Plan:
        chosen, skipped = choose(graph, self.include, self.exclude)
        changes = {layer.name: entry for layer, entry in weight_entries(chosen, self.edges, self.edges) if entry}
        skipped |= {layer.name: "its weight is quantized already" for layer in chosen if layer.name not in changes}
        skipped |= {layer.name: "its zeros must stay, and a sign has none" for layer in chosen if layer.weight in graph.sparse}
        ends = {layer.weight for layer in (chosen[:1] + chosen[-1:])}
        for layer in chosen:
            if layer.name in changes and layer.weight not in ends and layer.kind != "embedding":
                changes[layer.name] = {"weight": {"bits": 1, "axis": layer.scale_axis}}
        return Plan({name: change for name, change in changes.items() if name not in skipped}, skipped)

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        signs = [layer for layer in layers(graph) if plan.changes.get(layer.name, {}).get("weight", {}).get("bits") == 1]
        others = Plan({name: change for name, change in plan.changes.items() if change["weight"]["bits"] > 1})
        round_weights(graph, graph, others, task, 0)
        midrise = Midrise(signs, 1)
        midrise.quantize(graph)
        rate = 2 * default_rate(graph, self.optimizer) if self.learning_rate is None else self.learning_rate
        graph.requires_grad_(True)
        how = Training(epochs=self.epochs, learning_rate=rate, optimizer=self.optimizer)
        measured = recover(graph, task, how, workdir, (midrise,))
        midrise.settle(graph)
        fuse(graph)
        return measured
