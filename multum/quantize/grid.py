"""The arithmetic of quantization, as functions on tensors.

A real number is `scale * (integer - zero point)`. Rounding is to the nearest integer, halves to the even one (IEEE 754).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-12  # of a tensor of zeros
_CANDIDATES = 80  # clipping ranges tried by `best_scale`, evenly from 1/80 of the largest value to all of it
_REFINEMENTS = 3  # least-squares steps after that


@dataclass(frozen=True)
class Grid:
    """The integers `low` to `high`, with one scale for every index of dimension `axis`, or a single one."""

    low: int
    high: int
    axis: int | None = None

    def broadcast(self, values: Tensor, ndim: int) -> Tensor:
        """One value per channel [channels], or a single one [], shaped to meet a tensor of `ndim` dimensions."""
        return values if self.axis is None else values.reshape([-1 if dim == self.axis else 1 for dim in range(ndim)])


def signed(bits: int, axis: int | None = None) -> Grid:
    """As many negative as positive integers, -127..127 for 8 bits, -1..1 for 2: a weight and its opposite are equally exact."""
    return Grid(1 - (1 << bits - 1), (1 << bits - 1) - 1, axis)


def unsigned(bits: int, axis: int | None = None) -> Grid:
    """0..255 for 8 bits."""
    return Grid(0, (1 << bits) - 1, axis)


def levels(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """The integers nearest to x, clipped to the grid, as floating-point numbers of x's shape."""
    scale, zero_point = (grid.broadcast(value, x.ndim) for value in (scale, zero_point))
    return torch.clamp(torch.round(x / scale) + zero_point, grid.low, grid.high)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """x moved to the nearest number of the grid."""
    return grid.broadcast(scale, x.ndim) * (levels(x, scale, zero_point, grid) - grid.broadcast(zero_point, x.ndim))


def affine(low: float, high: float, grid: Grid) -> tuple[float, int]:
    """Scale and zero point that spread the range over the whole grid. The range is widened to hold zero, which stays exact."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / (grid.high - grid.low), SMALLEST_SCALE)
    return scale, min(max(grid.low - round(low / scale), grid.low), grid.high)


def largest(x: Tensor, grid: Grid) -> Tensor:
    """The largest magnitude, per channel [channels] or in all []."""
    others = [dim for dim in range(x.ndim) if dim != grid.axis]
    return x.detach().abs().amax(others) if others else x.detach().abs()


def full_scale(x: Tensor, grid: Grid) -> Tensor:
    """The symmetric scale at which the largest magnitude is just not clipped, per channel [channels] or in all []."""
    return (largest(x, grid) / grid.high).clamp_min(SMALLEST_SCALE)


def best_scale(x: Tensor, grid: Grid) -> Tensor:
    """The symmetric scale with the least squared error, per channel [channels] or in all [].

    Clipping ranges are tried in turn; the best is refined by least squares: with the integers q fixed, <x, q> / <q, q> is the best scale.
    """
    x = x.detach()
    whole, zero = full_scale(x, grid), torch.zeros((), dtype=x.dtype, device=x.device)
    best, least = whole, _squared_error(x, whole, zero, grid)
    for step in range(1, _CANDIDATES):
        best, least = _better(x, whole * (step / _CANDIDATES), best, least, zero, grid)
    for _ in range(_REFINEMENTS):
        integers = levels(x, best, zero.expand_as(best), grid)
        norm = _sum(integers * integers, grid)
        candidate = torch.where(norm > 0, _sum(x * integers, grid) / norm.clamp_min(1), best).clamp_min(SMALLEST_SCALE)
        best, least = _better(x, candidate, best, least, zero, grid)
    return best


def _better(x: Tensor, candidate: Tensor, best: Tensor, least: Tensor, zero: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    error = _squared_error(x, candidate, zero, grid)
    return torch.where(error < least, candidate, best), torch.minimum(error, least)


def _squared_error(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    return _sum((quantize(x, scale, zero.expand_as(scale), grid) - x).square(), grid)


def _sum(x: Tensor, grid: Grid) -> Tensor:
    others = [dim for dim in range(x.ndim) if dim != grid.axis]
    return x.sum(others) if others else x
