"""Two thin layers for one, by singular values."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..errors import StepError
from ..graph import Graph, Layer, layers, select
from ..graph.matrix import data, multiplies, to_matrix
from ..graph.model import aten, read, shape
from ..step import Plan, Stage, Step, option
from ..task import Task
from .chain import Link, replace
from .ranks import Curve, by_budget, by_energy

_KINDS = ("conv", "linear", "embedding")


@dataclass(frozen=True)
class SVD(Step):
    """Replaces a layer of weight W [outputs, height] by two, of `rank` columns and rows: the best approximation (Eckart and Young 1936).

    A convolution becomes one with `rank` filters of the same window, stride and padding, and a 1x1 convolution (Zhang et al. 2015,
    section 3.1); an embedding, a narrower one and a linear layer. A layer for which two cost no less than one stays, and
    so do layers with groups, transposed ones and those that share their weight. The approximation is of the weights alone: training
    afterwards (`distill.Logits`) learns back what the data need.
    """

    stage: ClassVar[Stage | None] = Stage.STRUCTURE

    energy: float = option(0.9, "share of the squared singular values of each layer that is kept")
    macs: float | None = option(None, "share of the layers' multiply-accumulates to keep, over all at once; takes the place of energy")
    parameters: float | None = option(None, "the same for their parameters")
    include: str | tuple[str, ...] = option("*", "layers that may be factorized, as glob patterns")
    exclude: str | tuple[str, ...] = option((), "layers that may not")

    def __post_init__(self) -> None:
        for name in ("energy", "macs", "parameters"):
            share = getattr(self, name)
            if share is not None and not 0 < share < 1:
                raise StepError(f"factorize.SVD: {name} is {share}.", "a share between 0 and 1, such as 0.5")
        if self.macs is not None and self.parameters is not None:
            raise StepError("factorize.SVD: macs and parameters are both given.", "one budget")

    def plan(self, graph: Graph, task: Task) -> Plan:
        uses = Counter(layer.weight for layer in layers(graph))
        chosen, skipped = dict[str, Layer](), dict[str, str]()
        for layer in select(graph, self.include, self.exclude, _KINDS):
            reason = "it shares its weight" if uses[layer.weight] > 1 else _reason(graph, layer)
            if reason is None and self.macs is not None and layer.kind == "embedding":
                reason = "it has no multiply-accumulates"
            if reason:
                skipped[layer.name] = reason
            else:
                chosen[layer.name] = layer
        curves = {name: _curve(graph, layer, self.macs is not None) for name, layer in chosen.items()}
        share = self.parameters if self.macs is None else self.macs
        ranks = by_budget(curves, share) if share is not None and curves else {n: by_energy(c, self.energy) for n, c in curves.items()}
        changes = {}
        for name, curve in curves.items():
            if name not in ranks:
                skipped[name] = "the budget is kept with less loss elsewhere" if curve.most else "two layers of rank one cost no less"
            elif ranks[name] > curve.most:
                skipped[name] = f"the rank that keeps so much energy is {ranks[name]}, and two layers cost less only up to {curve.most}"
            else:
                kept = 1 - float(curve.lost()[ranks[name] - 1])
                costs = [_macs(chosen[name]), _sides(graph, chosen[name], ranks[name]) * _positions(chosen[name])]
                changes[name] = {"rank": ranks[name], "of": len(curve.energy), "energy": kept, "macs": costs}
        return Plan(changes, skipped)

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        for layer in [layer for layer in layers(graph) if layer.name in plan.changes]:
            value = layer.node.args[1] if layer.kind == "embedding" else data(layer)
            bias = next((node for node in layer.node.all_input_nodes if node.target == layer.bias), None) if layer.bias else None
            assert isinstance(value, fx.Node)
            replace(graph, layer, value, bias, _links(layer, graph.tensor(layer.weight), plan.changes[layer.name]["rank"]))
        return {}


def _reason(graph: Graph, layer: Layer) -> str | None:
    """Why a layer has no two that could take its place; None when it has."""
    weight = graph.tensor(layer.weight)
    if layer.quantizer() is not None:
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


def _matrix(layer: Layer, weight: Tensor) -> Tensor:
    """The weight as [outputs, height]; of an embedding, a row for each entry."""
    return (weight if layer.kind == "embedding" else to_matrix(layer, weight)[0]).detach().double()


def _curve(graph: Graph, layer: Layer, macs: bool) -> Curve:
    matrix = _matrix(layer, graph.tensor(layer.weight))
    factor = _positions(layer) if macs else 1
    return Curve(torch.linalg.svdvals(matrix).square().cpu(), matrix.numel() * factor, sum(matrix.shape) * factor)


def _sides(graph: Graph, layer: Layer, rank: int) -> int:
    """The parameters of the two layers, without a bias; of an embedding, of the one that multiplies."""
    rows, columns = _matrix(layer, graph.tensor(layer.weight)).shape
    return rank * (columns if layer.kind == "embedding" else rows + columns)


def _macs(layer: Layer) -> int:
    value = layer.node.args[layer.position]
    assert isinstance(value, fx.Node)
    return 0 if layer.kind == "embedding" else prod(shape(value)) * _positions(layer)


def _positions(layer: Layer) -> int:
    """How often the layer multiplies its matrix, in one sample."""
    sizes = shape(layer.node)
    return prod(sizes[2:] if layer.kind == "conv" else sizes[1:-1])


def _links(layer: Layer, weight: Tensor, rank: int) -> list[Link]:
    left, values, right = torch.linalg.svd(_matrix(layer, weight), full_matrices=False)
    root = values[:rank].sqrt()
    outer, inner = (left[:, :rank] * root).to(weight.dtype), (root[:, None] * right[:rank]).to(weight.dtype)
    if layer.kind == "embedding":
        return [Link(aten.embedding.default, outer, tuple(layer.node.args[2:])), Link(aten.linear.default, inner.T)]
    if layer.kind == "linear":
        return [Link(aten.linear.default, inner), Link(aten.linear.default, outer)]
    point = getattr(aten, f"conv{weight.ndim - 2}d").default
    window = inner.reshape(rank, *weight.shape[1:])
    return [Link(layer.node.target, window, tuple(layer.node.args[3:])), Link(point, outer.reshape(*outer.shape, *[1] * (weight.ndim - 2)))]
