"""Ranges of activations, measured on calibration data in memory that does not grow with the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ..errors import StepError, TaskError
from ..graph import Graph, Layer
from ..graph.matrix import channel_dim, data
from ..graph.watch import Watch
from ..task import Task, batch_size, calibration
from .grid import Grid, affine
from .moments import as_rows

_HALF = 4096  # bins on each side of zero
_KEPT = 0.9999  # share of the values that the percentile range holds
_CLOSE = 0.05  # parts of a range that one more look may change
_SHRINKS = np.linspace(1.0, 0.1, 91)  # parts of the full range that the MSE range tries


class Histogram:
    """Counts of values in bins of equal width, anchored at zero; the width is a power of two and doubles when a value lies outside.

    The result does not depend on the order or the size of the batches.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(2 * _HALF, dtype=torch.float64)
        self.width = 0.0
        self.low, self.high = float("inf"), float("-inf")
        self.batches, self.ends = 0, (0.0, 0.0)  # and the sums of the lowest and the highest value of each
        self.widths: dict[int, float] = {}  # of the range that holds nearly all values, by the samples seen until then

    def update(self, x: Tensor, importance: Tensor | None = None) -> None:
        """Counts the values of x, as often as `importance`, which broadcasts with x, says. Raises ValueError when not all are finite."""
        if not x.numel():
            return
        low, high = (float(value) for value in torch.aminmax(x.detach()))
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError("NaN or infinite values")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.batches, self.ends = self.batches + 1, (self.ends[0] + low, self.ends[1] + high)
        reach = max(abs(low), abs(high))
        if reach and not self.width:
            self.width = 2.0 ** np.floor(np.log2(reach / _HALF))
        while reach >= _HALF * self.width > 0:
            self._double()
        edge = _HALF * self.width or 1.0
        if importance is None:
            self.counts += torch.histc(x.detach().float().cpu(), 2 * _HALF, -edge, edge).double()
        else:
            places = torch.floor(x.detach().double() * (_HALF / edge)).long().add_(_HALF).clamp_(0, 2 * _HALF - 1)
            parts = importance.expand_as(x).double().flatten()
            self.counts += torch.bincount(places.flatten().cpu(), parts.cpu(), 2 * _HALF)

    def _double(self) -> None:
        merged = torch.zeros_like(self.counts)
        merged[_HALF // 2 : _HALF // 2 + _HALF] = self.counts.reshape(-1, 2).sum(1)
        self.counts, self.width = merged, 2 * self.width

    def look(self, samples: int) -> None:
        """Notes the range after so many samples."""
        if self.low <= self.high:
            low, high = percentile(self, Grid(0, 1))
            self.widths[samples] = high - low

    @property
    def sufficed(self) -> int:
        """The samples after which the range that is found last was there, and stayed, to within a twentieth."""
        wrong = [seen for seen, width in self.widths.items() if abs(width - list(self.widths.values())[-1]) > _CLOSE * width]
        return next((seen for seen in self.widths if seen > max(wrong, default=0)), 0)

    def bins(self) -> tuple[np.ndarray, np.ndarray]:
        """Centres and counts of the bins that are not empty."""
        counts = self.counts.numpy()
        filled = np.flatnonzero(counts)
        centres = (filled - _HALF + 0.5) * self.width
        return np.clip(centres, self.low, self.high), counts[filled]


def minmax(histogram: Histogram, grid: Grid) -> tuple[float, float]:
    """All that was seen."""
    return histogram.low, histogram.high


def average(histogram: Histogram, grid: Grid) -> tuple[float, float]:
    """The mean over the batches of what each holds, a moving average with equal parts (Jacob et al. 2018, section 3.1)."""
    return histogram.ends[0] / max(1, histogram.batches), histogram.ends[1] / max(1, histogram.batches)


def percentile(histogram: Histogram, grid: Grid) -> tuple[float, float]:
    """All but the outermost 0.01 % of the values, half of them on each side."""
    centres, counts = histogram.bins()
    share = np.cumsum(counts) / counts.sum()
    ends = np.searchsorted(share, [(1 - _KEPT) / 2, (1 + _KEPT) / 2])
    low, high = centres[ends.clip(max=len(centres) - 1)]
    return float(low), float(high)


def mse(histogram: Histogram, grid: Grid) -> tuple[float, float]:
    """The range with the least squared error of rounding and clipping together: first the one end is shrunk, then the other."""
    centres, counts = histogram.bins()

    def error(low: float, high: float) -> float:
        scale, zero = affine(low, high, grid)
        rounded = scale * (np.clip(np.rint(centres / scale) + zero, grid.low, grid.high) - zero)
        return float(counts @ (rounded - centres) ** 2)

    return _shrunk(histogram, error)


def entropy(histogram: Histogram, grid: Grid) -> tuple[float, float]:
    """The range whose rounded values tell most about the real ones: the least Kullback-Leibler divergence (Migacz 2017)."""
    centres, counts = histogram.bins()

    def divergence(low: float, high: float) -> float:
        inside = (centres >= low) & (centres <= high)
        scale, zero = affine(low, high, grid)
        level = np.clip(np.rint(centres[inside] / scale) + zero, grid.low, grid.high).astype(int) - grid.low
        own = counts[inside]
        if not own.size:
            return np.inf
        real, size = own.copy(), grid.high - grid.low + 1
        real[0] += counts[centres < low].sum()
        real[-1] += counts[centres > high].sum()
        spread = (np.bincount(level, own, size) / np.maximum(np.bincount(level, minlength=size), 1))[level]
        return float((real * np.log((real / real.sum()) / (spread / spread.sum()))).sum() / real.sum())

    return _shrunk(histogram, divergence)


def _shrunk(histogram: Histogram, loss: Callable[[float, float], float]) -> tuple[float, float]:
    """The range with the least loss when first its one end is shrunk, then the other."""
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    high = min((high * part for part in _SHRINKS), key=lambda end: loss(low, end)) if high else high
    low = min((low * part for part in _SHRINKS), key=lambda end: loss(end, high)) if low else low
    return float(low), float(high)


OBSERVERS: dict[str, Callable[[Histogram, Grid], tuple[float, float]]] = {
    "minmax": minmax, "average": average, "percentile": percentile, "mse": mse, "entropy": entropy, "weighted": mse,
}  # fmt: skip


def importances(graph: Graph, nodes: Iterable[fx.Node], chosen: Iterable[Layer]) -> dict[fx.Node, Tensor]:
    """For each value that some of these layers read, what an error of 1 in a channel does to their outputs, squared, to broadcast with it.

    That is what the observer "weighted" counts values by: it looks for the least error behind the weights.
    """
    found: dict[fx.Node, Tensor] = {}
    for layer in chosen:
        if layer.kind in ("conv", "linear") and (value := data(layer)) in nodes:
            energy = as_rows(graph.tensor(layer.weight).detach(), layer).square().sum(1)  # [groups, inputs]
            size = value.meta["val"].shape[channel_dim(layer)]
            own = energy.reshape(size, -1).sum(1)
            found[value] = found.get(value, 0) + (own if layer.kind == "linear" else own.reshape(-1, *[1] * (value.meta["val"].ndim - 2)))
    return {value: own / own.mean().clamp_min(1e-30) for value, own in found.items()}


def observe(
    graph: Graph, nodes: Iterable[fx.Node], task: Task, samples: int, importance: Mapping[fx.Node, Tensor] | None = None
) -> dict[fx.Node, Histogram]:
    """A histogram of the values of each node on the calibration data, the graph in eval mode; counted by `importance` where there is one.

    `Histogram.sufficed` tells after how many samples the range that holds nearly all values was there to within a twentieth.
    Raises StepError when a value is NaN or infinite, TaskError when the data hold no sample or nothing but one number.
    """
    histograms = {node: Histogram() for node in nodes}
    entries = {node: Histogram() for node in graph.fx.nodes if node.op == "placeholder"}

    def see(node: fx.Node, value: Any) -> None:
        for found in (part for part in (histograms, entries) if node in part):
            try:
                found[node].update(value, (importance or {}).get(node) if found is histograms else None)
            except ValueError:
                where = node.meta.get("module") or node.name
                raise StepError(
                    f"The values of {node.name} in {where!r} are NaN or infinite on the calibration data.",
                    "a network that computes finite numbers",
                    "check the network in float on these data first",
                ) from None

    graph.eval()
    watch = Watch(graph, {*histograms, *entries}, see)
    seen, look = 0, 1
    with torch.inference_mode():
        for turn, inputs in enumerate(calibration(task, samples), 1):
            watch(inputs)
            seen += batch_size(inputs)
            if turn == look:  # after 1, 2, 4, 8 ... batches
                look *= 2
                for histogram in histograms.values():
                    histogram.look(seen)
    for histogram in histograms.values():
        histogram.look(seen)
    if all(histogram.low >= histogram.high for histogram in entries.values()):
        raise TaskError("The calibration data are empty or hold nothing but one number.", "samples like those that the network will meet")
    return histograms
