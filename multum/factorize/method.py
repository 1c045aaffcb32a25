"""What the methods share: which layers may be factorized, their ranks, and the chains that take their places."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..analyze.evidence import Evidence
from ..errors import StepError
from ..graph import Graph, Layer, layers, select
from ..graph.matrix import data, multiplies
from ..graph.model import read, shape
from ..step import Plan, Stage, Step, option
from ..task import Task
from .chain import Link, replace
from .ranks import Curve, by_budget, by_energy

_DAMP = 1e-7  # of the mean of a gram's diagonal, added to it


@dataclass(frozen=True)
class Factorization(Step):
    """A layer becomes a chain of layers, where that costs less; ranks by the energy that is kept, or by one budget over all layers.

    A method says which layers it takes (`kinds`, `reason`), what they lose and cost at each rank (`curve`), and what the chain is
    (`links`). With calibration data the energy is that of the layer's outputs on them, else that of its weights.
    """

    stage: ClassVar[Stage | None] = Stage.STRUCTURE
    kinds: ClassVar[Sequence[str]] = ("conv",)

    energy: float = option(0.9, "share of each layer's energy that is kept")
    macs: float | None = option(None, "share of the layers' multiply-accumulates to keep, over all at once; takes the place of energy")
    parameters: float | None = option(None, "the same for their parameters")
    samples: int = option(256, "calibration samples, where there are any, whose outputs are kept; 0: look at the weights alone")
    include: str | tuple[str, ...] = option("*", "layers that may be factorized, as glob patterns")
    exclude: str | tuple[str, ...] = option((), "layers that may not")

    def __post_init__(self) -> None:
        for name in ("energy", "macs", "parameters"):
            share = getattr(self, name)
            if share is not None and not 0 < share < 1:
                raise StepError(f"{self.name()}: {name} is {share}.", "a share between 0 and 1, such as 0.5")
        if self.macs is not None and self.parameters is not None:
            raise StepError(f"{self.name()}: macs and parameters are both given.", "one budget")
        if self.samples < 0:
            raise StepError(f"{self.name()}: samples is {self.samples}.", "0 or more")

    def reason(self, graph: Graph, layer: Layer) -> str | None:
        """Why a layer is not for this method, beside the reasons that all have."""
        return None

    def curve(self, layer: Layer, weight: Tensor, second: Tensor | None, macs: bool) -> Curve:
        """Of a weight in double precision and the second moments of its columns [height, height]; costs are parameters or MACs."""
        raise NotImplementedError

    def links(self, layer: Layer, weight: Tensor, second: Tensor | None, ranks: Sequence[int]) -> list[Link]:
        """The chain of these ranks, in double precision."""
        raise NotImplementedError

    def plan(self, graph: Graph, task: Task) -> Plan:
        uses = Counter(layer.weight for layer in layers(graph))
        chosen, skipped = dict[str, Layer](), dict[str, str]()
        for layer in select(graph, self.include, self.exclude, self.kinds):
            reason = "it shares its weight" if uses[layer.weight] > 1 else _reason(graph, layer) or self.reason(graph, layer)
            if reason is None and self.macs is not None and layer.kind == "embedding":
                reason = "it has no multiply-accumulates"
            if reason:
                skipped[layer.name] = reason
            else:
                chosen[layer.name] = layer
        evidence, curves = self._evidence(graph, task), dict[str, Curve]()
        for name, layer in chosen.items():
            curves[name] = self.curve(layer, _double(graph, layer), _second(evidence, layer), self.macs is not None)
        share = self.parameters if self.macs is None else self.macs
        found = by_budget(curves, share) if share is not None and curves else {n: by_energy(c, self.energy) for n, c in curves.items()}
        changes = {}
        for name, curve in curves.items():
            if name not in found:
                skipped[name] = (
                    "the budget is kept with less loss elsewhere" if bool(curve.pays.any()) else "factors of rank one cost no less"
                )
            elif not curve.pays[found[name]]:
                skipped[name] = f"at the rank that keeps so much energy, {_brief(curve.rank(found[name]))}, the factors cost no less"
            else:
                ranks, kept = curve.rank(found[name]), 1 - float(curve.lost[found[name]])
                costs = [int(curve.whole), int(curve.costs[found[name]])]
                unit = "parameters" if self.macs is None else "macs"
                changes[name] = {"rank": _brief(ranks), "of": _brief(curve.ranks.amax(0).tolist()), "energy": kept, unit: costs}
        return Plan(changes, skipped)

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        evidence, made = self._evidence(graph, task), list[tuple[Layer, list[Link]]]()
        for layer in [layer for layer in layers(graph) if layer.name in plan.changes]:
            rank = plan.changes[layer.name]["rank"]
            ranks = [rank] if isinstance(rank, int) else rank
            made.append((layer, self.links(layer, _double(graph, layer), _second(evidence, layer), ranks)))
        for layer, links in made:
            value = layer.node.args[1] if layer.kind == "embedding" else data(layer)
            bias = next((node for node in layer.node.all_input_nodes if node.target == layer.bias), None) if layer.bias else None
            assert isinstance(value, fx.Node)
            replace(graph, layer, value, bias, links)
        return {}

    def _evidence(self, graph: Graph, task: Task) -> Evidence | None:
        has_data = task is not None and (task.calibration is not None or task.train is not None)
        return Evidence(graph, task, self.samples) if self.samples and has_data else None


def _reason(graph: Graph, layer: Layer) -> str | None:
    """Why a layer has no chain that could take its place; None when it may have."""
    weight = graph.tensor(layer.weight)
    if layer.quantizer() is not None or not weight.is_floating_point():
        return "its weight is quantized"
    if layer.weight in graph.sparse:
        return "its zeros would be filled"
    if layer.kind != "embedding" and not multiplies(layer):
        return "it is a transposed convolution"
    if read(layer.node, "groups", 1) != 1:
        return "it has groups"
    if weight.ndim < 2 or (layer.kind != "conv" and weight.ndim > 2) or layer.node.kwargs:
        return "it is not a product of two matrices"
    return None


def positions(layer: Layer) -> int:
    """How often the layer multiplies its matrix, in one sample."""
    sizes = shape(layer.node)
    return prod(sizes[2:] if layer.kind == "conv" else sizes[1:-1])


def per_dimension(layer: Layer, name: str) -> Any:
    """Stride, padding or dilation of a convolution for each dimension; padding may be a word."""
    value = read(layer.node, name)
    return value if isinstance(value, str) or len(value) > 1 else list(value) * (len(shape(layer.node)) - 2)


def _double(graph: Graph, layer: Layer) -> Tensor:
    return graph.tensor(layer.weight).detach().double()


def _second(evidence: Evidence | None, layer: Layer) -> Tensor | None:
    return evidence.second(layer)[0] if evidence is not None and multiplies(layer) else None


def _brief(ranks: list[int]) -> int | list[int]:
    return ranks[0] if len(ranks) == 1 else ranks


def refitted(matrix: Tensor, second: Tensor | None, features: Tensor) -> Tensor:
    """The best last factor [outputs, features] when features @ columns is what it reads: least squares on the layer's outputs."""
    second = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device) if second is None else second.double()
    seen = second @ features.T
    gram = features @ seen
    damp = _DAMP * gram.diagonal().mean().clamp_min(1e-30) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    found: Tensor = torch.linalg.solve(gram + damp, (matrix @ seen).T).T
    return found
