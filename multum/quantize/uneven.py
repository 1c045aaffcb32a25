"""Grids whose values are not evenly spaced, and those of fixed-point numbers, as functions on tensors.

An uneven grid is a sorted set of integers among -127 ... 127, times a scale for each channel: integer kernels run it as they run any
8-bit weight, a file needs nothing new, and entropy coding pays only for the integers that occur. What falls between integers moves by at
most 0.4 % of the largest.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .grid import SMALLEST_SCALE, Grid, full_scale, largest

LARGEST = 127
_PARTS = 60  # of the scale that clips nothing, tried by `fitted`, evenly from 0.41 to 1
_SEEN = 1 << 20  # weights from which quantiles are read


def integers(values: Tensor) -> Tensor:
    """Values [n] as the nearest distinct integers with the largest magnitude at 127."""
    found: Tensor = torch.unique(torch.round(values / values.abs().max().clamp_min(SMALLEST_SCALE) * LARGEST))
    return found


def normal(bits: int) -> Tensor:
    """Quantiles of the normal distribution from -1 to 1, with an exact zero and one more positive than negative value [2^bits].

    NF4 is the one of 4 bits (Dettmers et al. 2023, "QLoRA", section 3 and appendix E).
    """
    half = 1 << bits - 1
    end = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    above, below = (torch.special.ndtri(torch.linspace(end, 0.5, n + 1, dtype=torch.float64)[:-1]) for n in (half, half - 1))
    return torch.cat([-below, above.new_zeros(1), above.flip(0)]).float() / float(above.max())


def powers(bits: int) -> Tensor:
    """Zero and plus or minus 2^-k, k = 0 ... 2^(bits-1) - 2: a shift in the place of each multiplication (Miyashita et al. 2016)."""
    found = 2.0 ** -torch.arange(2.0 ** (bits - 1) - 1)
    return torch.cat([-found, found.new_zeros(1), found.flip(0)])


def additive(bits: int) -> Tensor:
    """Sums of powers of two, one of each of n = (bits - 1) / 2 sets (Li et al. 2020, "Additive powers-of-two", section 2.2).

    Set i holds 0 and 2^-i, 2^-(i+n), 2^-(i+2n); for an odd number of bits of the magnitude the last one holds 0 and 2^-i alone.
    """
    sets = -(-(bits - 1) // 2)
    sums = torch.zeros(1)
    for i in range(sets):
        several = 1 if i == sets - 1 and (bits - 1) % 2 else 3
        terms = torch.tensor([0.0, *(2.0 ** -(i + j * sets) for j in range(several))])
        sums = (sums[:, None] + terms).flatten()
    found = torch.unique(sums)
    return torch.cat([-found.flip(0)[:-1], found]) / float(found.max())


def quantiles(x: Tensor, bits: int) -> Tensor:
    """Each value stands for as many entries of x as any other: the medians of 2^bits parts, the one nearest to zero being zero."""
    x = x.detach().flatten().float()
    x = x[:: -(-x.numel() // _SEEN)]
    parts = (torch.arange(1 << bits, dtype=x.dtype, device=x.device) + 0.5) / (1 << bits)
    found = torch.quantile(x, parts)
    found[found.abs().argmin()] = 0.0
    return found / found.abs().max().clamp_min(SMALLEST_SCALE)


FIXED: dict[str, Callable[[int], Tensor]] = {"normal": normal, "power": powers, "additive": additive}  # whatever the weights
GRIDS = (*FIXED, "quantile")


def nearest(x: Tensor, grid: Tensor) -> Tensor:
    """The entry of a sorted grid [n] that is nearest to each entry of x; the lower of two that are equally near."""
    grid = grid.to(x)
    return grid[torch.bucketize(x.contiguous(), (grid[1:] + grid[:-1]) / 2)]


def fitted(x: Tensor, codes: Tensor, axis: int) -> Tensor:
    """The scale of each channel [channels] with the least squared error on the grid of these integers."""
    reach = Grid(-LARGEST, LARGEST, axis)
    others = [dim for dim in range(x.ndim) if dim != axis]
    whole = full_scale(x, reach)
    best, least = whole, torch.full_like(whole, math.inf)
    for part in torch.linspace(0.41, 1.0, _PARTS).tolist():
        scale = reach.broadcast(whole * part, x.ndim)
        error = (scale * nearest(x / scale, codes) - x).square().sum(others)
        best, least = torch.where(error < least, whole * part, best), torch.minimum(error, least)
    return best


def power_scale(x: Tensor, grid: Grid) -> Tensor:
    """The least power of two at which no value is clipped, per channel [channels] or in all []: the last place of fixed-point numbers."""
    return torch.exp2(torch.ceil(torch.log2((largest(x, grid) / grid.high).clamp_min(SMALLEST_SCALE))))


def _stochastic(x: Tensor, random: torch.Generator | None) -> Tensor:
    below = torch.floor(x)
    return below + (torch.rand(x.shape, generator=random, device=x.device) < x - below)


# How a number becomes an integer. Truncation drops the last places, toward minus infinity; stochastic rounding is right on average
# (Gupta et al. 2015, "Deep learning with limited numerical precision", section 3).
PLACES: dict[str, Callable[[Tensor, torch.Generator | None], Tensor]] = {
    "nearest": lambda x, _: torch.round(x),
    "truncate": lambda x, _: torch.floor(x),
    "stochastic": _stochastic,
}


def fixed_point(x: Tensor, step: Tensor, grid: Grid, rounding: str, random: torch.Generator | None = None) -> Tensor:
    """x on multiples of `step`, which broadcasts with it, clipped to the integers of the grid."""
    return step * PLACES[rounding](x / step, random).clamp(grid.low, grid.high)
