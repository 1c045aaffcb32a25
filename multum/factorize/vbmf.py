"""The rank of a matrix as empirical variational Bayes sees it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TRIES, _NARROWINGS = 400, 60
_CRITICAL = 2.5129  # of the root of the ratio of sides: the least tau of a component that is told from noise


def rank(matrix: Tensor) -> int:
    """How many singular values of a matrix [rows, columns] stand out of white noise; 0 when none does.

    The global solution of empirical variational Bayesian matrix factorization with the variance of the noise unknown, in closed form up
    to that one number (Nakajima, Sugiyama, Babacan & Tomioka 2013, "Global analytic solution of fully-observed variational Bayesian
    matrix factorization", theorem 2 and corollary 2).
    """
    values = torch.linalg.svdvals(matrix.double()).square()
    values = values[values > 1e-14 * values.max().clamp_min(1e-300)]  # of a matrix of low rank no noise can be told
    short, long = sorted(matrix.shape)
    if len(values) < short:
        return len(values)
    ratio = short / long
    tau = _CRITICAL * math.sqrt(ratio)
    critical = (1 + tau) * (1 + ratio / tau)
    beyond = min(math.ceil(short / (1 + ratio)) - 1, short - 1)
    low = max(float(values[beyond]) / (long * critical), float(values[beyond:].mean()) / long)
    high = float(values.sum()) / (short * long)
    noise = _least(values, long, ratio, critical, min(low, high), high)
    return int((values > long * noise * critical).sum())


def _least(values: Tensor, long: int, ratio: float, critical: float, low: float, high: float) -> float:
    """The variance of the noise of least free energy: the best of many, then ever finer around it."""

    def energies(noise: Tensor) -> Tensor:
        x = values / (long * noise[:, None])
        seen = x > critical
        above = x.clamp_min(critical)
        tau = 0.5 * (above - (1 + ratio) + ((above - (1 + ratio)).square() - 4 * ratio).sqrt())
        kept = above - tau + ((tau + 1) / above).log() + ratio * (tau / ratio + 1).log()
        return torch.where(seen, kept, x - x.log()).sum(1)

    tries = torch.logspace(math.log10(low), math.log10(high), _TRIES, dtype=torch.double)
    best = int(energies(tries).argmin())
    low, high = float(tries[max(best - 1, 0)]), float(tries[min(best + 1, _TRIES - 1)])
    for _ in range(_NARROWINGS):
        pair = torch.tensor([low + (high - low) / 3, high - (high - low) / 3], dtype=torch.double)
        first, second = energies(pair).tolist()
        low, high = (low, float(pair[1])) if first <= second else (float(pair[0]), high)
    return (low + high) / 2
