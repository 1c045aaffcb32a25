"""Weighted k-means of vectors, in groups side by side, with or without a price for the bits of an index."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ITERATIONS = 25
_SAMPLE = 1 << 16  # vectors of a group from which its codebook is learned
_AHEAD = 1 << 24  # distances that are held at once


def kmeans(
    vectors: Tensor, weights: Tensor, entries: int, start: str = "kmeans++", price: float = 0.0, seed: int = 0, zero: bool = False
) -> Tensor:
    """Codebooks [groups, entries, size] for vectors [groups, n, size] with weights of the same shape (Lloyd 1982).

    With a `price` the cost of a vector is its weighted squared error plus the price times the bits of its index, -log2 of the share
    of vectors that have it (Chou, Lookabaugh & Gray 1989, section II; weighted: Choi, El-Khamy & Lee 2017, section 5). With `zero`
    one entry stays zero. `start` is "kmeans++" (Arthur & Vassilvitskii 2007), or for single numbers "linear", evenly over their range, or
    "density", evenly over their ranks.
    """
    random = torch.Generator().manual_seed(seed)
    if vectors.shape[1] > _SAMPLE:
        chosen = torch.randperm(vectors.shape[1], generator=random)[:_SAMPLE].to(vectors.device)
        vectors, weights = vectors[:, chosen], weights[:, chosen]
    codebook = _STARTS[start](vectors, weights, entries, random)
    bits = vectors.new_full(codebook.shape[:2], math.log2(entries))
    for _ in range(_ITERATIONS):
        if zero:
            codebook.scatter_(1, codebook.square().sum(2, keepdim=True).argmin(1, keepdim=True).expand(-1, -1, codebook.shape[2]), 0)
        index, cost = assign(vectors, weights, codebook, price * bits)
        spread = index[..., None].expand_as(vectors)
        total, share = (torch.zeros_like(codebook).scatter_add_(1, spread, part) for part in (weights * vectors, weights))
        counts = torch.zeros_like(bits).scatter_add_(1, index, torch.ones_like(cost))
        codebook = torch.where(share > 0, total / share.clamp_min(1e-30), codebook)
        if price:
            bits = -torch.log2(counts.clamp_min(0.5) / vectors.shape[1])
        elif bool((counts == 0).any()):
            codebook = _reseeded(codebook, counts, vectors, cost)
    if zero:
        codebook.scatter_(1, codebook.square().sum(2, keepdim=True).argmin(1, keepdim=True).expand(-1, -1, codebook.shape[2]), 0)
    return codebook


def assign(vectors: Tensor, weights: Tensor, codebook: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
    """The entry with the least cost for each vector [groups, n], and that cost, when each entry has a penalty [groups, entries]."""
    step = max(1, _AHEAD // (codebook.shape[0] * codebook.shape[1]))
    found = []
    for x, w in zip(torch.split(vectors, step, 1), torch.split(weights, step, 1), strict=True):
        cost = torch.baddbmm(penalty[:, None], w, codebook.square().mT) - 2 * (w * x) @ codebook.mT
        best = cost.min(2)
        found.append((best.indices, best.values + (w * x * x).sum(2)))
    indices, costs = zip(*found, strict=True)
    return torch.cat(indices, 1), torch.cat(costs, 1)


def bits_of(index: Tensor, entries: int) -> Tensor:
    """The bits of each entry [groups, entries] by how often each group has it in `index` [groups, n]; half a time when never."""
    counts = torch.zeros(len(index), entries, device=index.device).scatter_add_(1, index, torch.ones(index.shape, device=index.device))
    return -torch.log2(counts.clamp_min(0.5) / index.shape[1])


def _reseeded(codebook: Tensor, counts: Tensor, vectors: Tensor, cost: Tensor) -> Tensor:
    """Entries that nobody has move to the vectors that are served worst."""
    worst = cost.topk(min(codebook.shape[1], cost.shape[1]), 1).indices
    place = (counts == 0).cumsum(1).sub(1).clamp(0, worst.shape[1] - 1)
    moved = vectors.gather(1, worst.gather(1, place)[..., None].expand(-1, -1, vectors.shape[2]))
    return torch.where((counts == 0)[..., None], moved, codebook)


def _plusplus(vectors: Tensor, weights: Tensor, entries: int, random: torch.Generator) -> Tensor:
    """Each next vector is drawn in proportion to its cost under those before."""
    cost = (weights * vectors.square()).sum(2) + 1e-30
    chosen = list[Tensor]()
    for _ in range(entries):
        level = cost.double().cumsum(1)
        draw = torch.rand(len(vectors), 1, generator=random, dtype=torch.double).to(level.device) * level[:, -1:]
        index = torch.searchsorted(level, draw).clamp(max=vectors.shape[1] - 1)
        chosen.append(vectors.gather(1, index[..., None].expand(-1, -1, vectors.shape[2])))
        new = (weights * (vectors - chosen[-1]).square()).sum(2) + 1e-30
        cost = torch.minimum(cost, new) if len(chosen) > 1 else new
    return torch.cat(chosen, 1)


def _linear(vectors: Tensor, weights: Tensor, entries: int, random: torch.Generator) -> Tensor:
    low, high = vectors.amin(1, keepdim=True), vectors.amax(1, keepdim=True)
    return low + (high - low) * torch.linspace(0, 1, entries, device=vectors.device, dtype=vectors.dtype)[:, None]


def _density(vectors: Tensor, weights: Tensor, entries: int, random: torch.Generator) -> Tensor:
    ranks = (torch.arange(entries, device=vectors.device) + 0.5) * vectors.shape[1] / entries
    return vectors.sort(1).values[:, ranks.long()]


_STARTS = {"kmeans++": _plusplus, "linear": _linear, "density": _density}
STARTS = tuple(_STARTS)
