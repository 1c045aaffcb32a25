"""How far a file is from the least that its numbers could take: entropies, and rate-distortion bounds at the distortion reached."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..graph import Graph, layers
from . import mip, model

_BINS, _FINE = 384, 0.01  # of a histogram; distortion, relative to the variance, below which it would be too coarse
_SMALLEST = 1e-300  # a probability, for kernels so narrow that no output reaches a bin
_SLOPES = (0.7, 0.85, 1.0, 1.2, 1.5)  # of the curve, in those of a Gaussian's at the same distortion
_ROUNDS = 80
_FEWEST = 64  # numbers that have a distribution
_SAMPLE = 1 << 20  # numbers from which a distribution is taken
Array = NDArray[Any]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Limit:
    """One tensor of a file. Sizes are in bytes; None where a thing does not apply or there is no original to compare with.

    `bytes` is the coded size (small tensors of a stream share it in proportion to their entropy). `entropy` is the zero-order
    entropy of the stored integers: what coding one by one, with a table for free, would need. `distortion` is the mean squared error
    against the original, over its variance, with a factor for each output channel left free, for scales are stored apart.
    `gaussian` and `bound` are what any code whatever needs for this distortion: of independent Gaussian numbers of this variance
    (Cover & Thomas, "Elements of Information Theory", section 10.3), and of independent numbers distributed as those of the original.
    A code can go below where neighbours tell about each other.
    """

    name: str
    shape: list[int]
    dtype: str
    bytes: int
    entropy: float | None = None
    distortion: float | None = None
    gaussian: float | None = None
    bound: float | None = None

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Limits:
    """The tensors of a file of `bytes` bytes; what is not theirs is `header`: the graph, names and records."""

    bytes: int
    header: int
    tensors: list[Limit]

    def to_data(self) -> dict[str, Any]:
        """`total` sums up the tensors that have a bound, `rest` is the bytes of the others."""
        bounded = [row for row in self.tensors if row.bound is not None]
        total = {key: sum(getattr(row, key) or 0 for row in bounded) for key in ("numbers", "bytes", "entropy", "gaussian", "bound")}
        rest = sum(row.bytes for row in self.tensors) - total["bytes"]
        return {"bytes": self.bytes, "header": self.header, "rest": rest, "total": total, "tensors": [asdict(row) for row in self.tensors]}


def limits(path: str | Path, original: Graph | None = None) -> Limits:
    """Compares the coded size of every tensor in a file with what it needs at least. Raises FileError as `load` does."""
    meta, arrays = mip.read(path)
    rows, weights = list[Limit](), dict[str, float]()
    for name, array in arrays.items():  # each is decoded once
        entropy = _entropy(array) if array.dtype.kind in "iub" and array.size else None
        weights[name] = float(array.nbytes) if entropy is None else entropy + 1
        rows.append(Limit(name, list(array.shape), array.dtype.name, 0, entropy))
    sizes = mip.sizes(path, weights)
    graph = model.load(path) if original is not None and meta.get("format") == model.FORMAT else None
    before = dict(original.named_tensors()) if original is not None else {}
    after = dict(graph.named_tensors()) if graph is not None else {}
    axes = {layer.weight: layer.scale_axis for layer in layers(graph)} if graph is not None else {}
    rows = [_bounded(replace(row, bytes=sizes[row.name]), before.get(row.name), after.get(row.name), axes.get(row.name)) for row in rows]
    total = Path(path).stat().st_size
    return Limits(total, total - sum(sizes.values()), rows)


def _entropy(array: Array) -> float:
    """Bytes by the tensor's own histogram."""
    counts = np.unique(array, return_counts=True)[1]
    return float(-(counts * np.log2(counts / array.size)).sum() / 8)


def _bounded(row: Limit, old: Tensor | None, new: Tensor | None, axis: int | None) -> Limit:
    if old is None or new is None or old.shape != new.shape or not old.is_floating_point() or old.numel() < _FEWEST:
        return row
    x, y = (tensor.detach().cpu().double() for tensor in (old, new))
    if axis is not None and x.ndim > 1:
        others = [dim for dim in range(x.ndim) if dim != axis]
        y = y * ((x * y).sum(others, keepdim=True) / (y * y).sum(others, keepdim=True).clamp_min(1e-300))
    variance, error = float(x.var(correction=0)), float((x - y).square().mean())
    if not 0 < error < math.inf or not 0 < variance < math.inf:
        return row
    part, size = error / variance, x.numel() / 8
    values = x.flatten()[:: -(-x.numel() // _SAMPLE)].numpy()
    bound = rate((values - values.mean()) / math.sqrt(variance), part)
    return replace(row, distortion=part, gaussian=size * max(0.0, -math.log2(part) / 2), bound=size * bound)


def rate(values: Floats, distortion: float) -> float:
    """Bits for each number that any code needs for a mean squared error of `distortion`, when numbers are drawn independently as `values`.

    A dual bound of the rate-distortion function: with a slope and any distribution of outputs, which Blahut's iteration (1972,
    section IV) improves. Where the distortion is small, Shannon's lower bound, which is then tight.
    """
    variance = float(values.var())
    if distortion >= variance:
        return 0.0
    if distortion < _FINE * variance:
        return max(0.0, _differential(values) - math.log2(2 * math.pi * math.e * distortion) / 2)
    counts, edges = np.histogram(values, _BINS)
    share = counts / counts.sum()
    points = (edges[1:] + edges[:-1]) / 2
    square = (points[:, None] - points) ** 2
    best = 0.0
    for slope in _SLOPES:
        slope /= 2 * distortion
        kernel = np.exp(-slope * square)
        outputs = np.full(_BINS, 1 / _BINS)
        for _ in range(_ROUNDS):
            reached = np.maximum(kernel @ outputs, _SMALLEST)
            gain = (share / reached) @ kernel
            outputs *= gain
        reached = np.maximum(kernel @ outputs, _SMALLEST)
        gain = (share / reached) @ kernel
        bits = -slope * distortion / math.log(2) - float(share @ np.log2(reached)) - math.log2(float(gain.max()))
        best = max(best, bits)
    return best


def _differential(values: Floats) -> float:
    """The differential entropy in bits, from spacings (Vasicek 1976)."""
    ordered = np.sort(values)
    width = max(1, round(math.sqrt(ordered.size)))
    spacing = np.maximum(ordered[2 * width :] - ordered[: -2 * width], 1e-12)
    return float(np.log2(spacing * ordered.size / (2 * width)).mean())
