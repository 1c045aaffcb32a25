"""The integers of weights, chosen from data: layer after layer, for the inputs that those before it make.

Weights do not make up here for what layers before them lost (`solved`, for methods that training follows): on pictures like those of the
calibration that gains a little, on others it takes most of what rounding well had gained (`bench/RESULTS.md`). Biases do, for the means.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..graph import Graph, Layer, layers
from ..graph.file import from_integers, grid
from ..graph.fuse import give_bias
from ..graph.layers import source
from ..graph.model import read
from ..task import Task
from .bias import correctable
from .grid import SMALLEST_SCALE
from .insert import quantize_weight
from .moments import TRANSPOSED, Moments, as_rows, from_rows, gather
from .rounding import ROUNDINGS, Problem, descend, gptq, nearest

_STAGES = 12  # passes over the data at the most; the layers of one stage see each other's weights as they were
_DAMPING = 0.01  # of the mean of H's diagonal, added to it: what little data say nothing about
_AT_ONCE = 1 << 24  # weights, for all candidates that are tried together
_PARTS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)  # of the scale that clips nothing, tried in turn


def choose_integers(
    graph: Graph, original: Graph, plan: Mapping[str, Any], task: Task, samples: int, biases: bool = True
) -> dict[str, dict[str, float]]:
    """Puts weights on grids, integers and scales chosen so that the outputs are as in `original`; in place.

    With `biases` the mean of the outputs is left to the biases, which are shifted at once, so that the layers after meet what they will.
    `plan` has the entry of each weight, {"bits": ..., "rounding": ...}, by the layer's name; both graphs have layers of the same
    names, and these are in float. Returns for each layer the mean squared error of its outputs, relative to their variance, with nearest
    rounding and as rounded.
    """
    twins = {layer.name: layer for layer in layers(original)}
    pairs = [(layer, twins[layer.name]) for layer in layers(graph) if layer.name in plan]
    free = {layer.name for layer in correctable(graph)} if biases else set()
    found = {}
    for stage in stages(pairs):
        for layer, moments in gather(graph, original, stage, task, samples).items():
            quantize_weight(graph, layer, plan[layer.name]["bits"])
            found[layer.name] = _round(graph, layer, moments, plan[layer.name]["rounding"], layer.name in free)
    return found


def stages(pairs: list[tuple[Layer, Layer]]) -> Iterator[list[tuple[Layer, Layer]]]:
    """In order of execution; all uses of a weight are in one stage."""
    weights = list(dict.fromkeys(layer.weight for layer, _ in pairs))
    size = max(1, -(-len(weights) // _STAGES))
    for start in range(0, len(weights), size):
        yield [pair for pair in pairs if pair[0].weight in weights[start : start + size]]


def _round(graph: Graph, layer: Layer, moments: Moments, method: str, centred: bool) -> dict[str, float]:
    quantizer = layer.quantizer()
    assert quantizer is not None
    weight = graph.tensor(layer.weight).detach()
    name = str(source(read(quantizer, "scale")))
    before, zero, low, high = grid(graph, quantizer, weight.ndim)
    H, target = damped(moments, centred), as_rows(weight, layer)
    sheet = Sheet(layer, weight, before.to(weight.device), (low - zero).to(weight.device), (high - zero).to(weight.device), target, H)
    plain = sheet.problem(sheet.scale)
    scale = search(sheet)
    q = ROUNDINGS[method](sheet.problem(scale))
    scale = refit(sheet, q, scale)
    q = descend(sheet.problem(scale), q)
    graph.set_tensor(name, scale.reshape(graph.tensor(name).shape))
    graph.set_tensor(layer.weight, from_integers(from_rows(q, layer, weight).contiguous() + zero.to(q.device), graph, quantizer))
    if centred and layer.node.target not in TRANSPOSED:
        means = as_rows(weight, layer) @ moments.first0[:, :, None] - sheet.rows(scale) * q @ moments.first[:, :, None]
        graph.tensor(give_bias(graph, layer)).data.add_(means.flatten() / moments.count)
    whole = ((target @ H) * target).sum().clamp_min(SMALLEST_SCALE)
    nearest_to_w, rounded = (problem.energy(q).sum() for problem, q in ((plain, nearest(plain)), (sheet.problem(scale), q)))
    return {"nearest": float(nearest_to_w / whole), "rounded": float(rounded / whole)}


def damped(moments: Moments, centred: bool) -> Tensor:
    """H [groups, inputs, inputs], kept away from zero where the data say nothing."""
    H, _ = moments.matrices(centred)
    raw = moments.second.diagonal(dim1=-2, dim2=-1) / moments.count
    # the last two: what rounding errors leave of inputs that are constant, or zero
    ridge = _DAMPING * H.diagonal(dim1=-2, dim2=-1).mean(-1) + 1e-5 * raw.mean(-1) + 1e-6 * raw.mean() + SMALLEST_SCALE
    return H + ridge[:, None, None] * torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)


def solved(moments: Moments, w: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """H, and the real weights that make of the inputs x what comes closest to what `w` made of x0, both [groups, ...].

    Worth it where training follows, or the data are like those of the calibration.
    """
    H, (bare, cross) = damped(moments, centred), moments.matrices(centred)
    loose = bare + (H - bare) * max(1.0, H.shape[-1] / moments.count / _DAMPING)
    return H, w + torch.linalg.solve(loose, (w @ (cross - bare)).mT).mT


@dataclass(frozen=True)
class Sheet:
    """A weight as rows, on a grid whose scale [shape that broadcasts over the weight] may be changed."""

    layer: Layer
    weight: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor
    target: Tensor
    H: Tensor

    def rows(self, values: Tensor) -> Tensor:
        return as_rows(values.expand_as(self.weight), self.layer)

    def problem(self, *scales: Tensor) -> Problem:
        """To round on each of these scales, one after the other in the dimension of rows."""
        w, low, high = (rows.repeat(1, len(scales), 1) for rows in (self.target, self.rows(self.low), self.rows(self.high)))
        return Problem(w, torch.cat([self.rows(scale) for scale in scales], 1), self.H, low, high)

    def share(self, values: Tensor) -> Tensor:
        """Values of rows [groups, rows] summed over those that have a scale in common, in the shape of the scale."""
        place = torch.arange(self.scale.numel(), device=values.device).reshape(self.scale.shape)
        total = values.new_zeros(self.scale.numel())
        return total.index_add(0, self.rows(place)[..., 0].flatten(), values.flatten()).reshape(self.scale.shape)


def search(sheet: Sheet) -> Tensor:
    """The scale with the least energy under GPTQ, among parts of the one that clips nothing and the one there is."""
    reach = from_rows(sheet.target, sheet.layer, sheet.weight).abs()
    dims = [dim for dim, size in enumerate(sheet.scale.shape or [1] * reach.ndim) if size == 1]
    whole = (reach.amax(dims, keepdim=True) if dims else reach).reshape(sheet.scale.shape) / sheet.high.amax()
    candidates = [sheet.scale, *(whole.clamp_min(SMALLEST_SCALE) * part for part in _PARTS)]
    energies = []
    for start in range(0, len(candidates), size := max(1, _AT_ONCE // sheet.weight.numel())):
        several = candidates[start : start + size]
        problem = sheet.problem(*several)
        energies += [sheet.share(energy) for energy in problem.energy(gptq(problem)).chunk(len(several), 1)]
    best = torch.stack(energies).argmin(0, keepdim=True)
    return torch.stack(candidates).gather(0, best)[0]


def refit(sheet: Sheet, q: Tensor, scale: Tensor) -> Tensor:
    """The scale that suits the integers q best, by least squares: <q, w> / <q, q> under H."""
    product = q @ sheet.H
    squares, products = sheet.share((product * q).sum(-1)), sheet.share((product * sheet.target).sum(-1))
    return torch.where((squares > 0) & (products > 0), products / squares, scale).clamp_min(SMALLEST_SCALE)
