"""The rank of every layer: by the energy that is kept, or as a budget over all layers at once allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import StepError

_HALVINGS = 60


@dataclass(frozen=True, eq=False)
class Curve:
    """What a layer loses and costs at each rank.

    `energy` holds the squares of its singular values, largest first [rank]; `whole` is its cost as it is, `each` that of a rank.
    """

    energy: Tensor
    whole: float
    each: float

    @property
    def most(self) -> int:
        """The largest rank that costs less than the layer; 0 when none does."""
        return min(len(self.energy), -int(-self.whole // self.each) - 1)

    def lost(self) -> Tensor:
        """The share of the energy that is lost at each rank from 1 on [rank]."""
        total = self.energy.sum().clamp(min=torch.finfo(self.energy.dtype).tiny)
        return (1 - self.energy.cumsum(0) / total).clamp(min=0)


def by_energy(curve: Curve, share: float) -> int:
    """The least rank that keeps this share of the energy."""
    enough = curve.lost() <= 1 - share + 1e-12
    return int(enough.nonzero()[0]) + 1 if bool(enough.any()) else len(curve.energy)


def by_budget(curves: Mapping[str, Curve], share: float) -> dict[str, int]:
    """The ranks that lose least, each layer's share of energy summed, when all layers cost at most `share` of what they do.

    A layer that stays whole is left out. One price for cost is sought at which every layer chooses for itself (Everett
    1963); the result is the best of those at such prices. Raises StepError when even rank one everywhere costs too much.
    """
    whole = sum(curve.whole for curve in curves.values())
    least = sum(min(curve.whole, curve.each) for curve in curves.values())
    if least > share * whole:
        raise StepError(
            f"A share of {share} is out of reach: at rank one everywhere {least / whole:.3f} is left.",
            "a share above that",
            "ask for less, or name more layers in include",
        )
    low, high = 0.0, 1.0
    while _cost(curves, _choose(curves, high / whole)) > share * whole:
        high *= 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if _cost(curves, _choose(curves, middle / whole)) <= share * whole else (middle, high)
    return _choose(curves, high / whole)


def _choose(curves: Mapping[str, Curve], price: float) -> dict[str, int]:
    """The rank of each layer with the least loss plus price times cost, where that beats the whole layer."""
    chosen = {}
    for name, curve in curves.items():
        if curve.most < 1:
            continue
        total = curve.lost()[: curve.most].cpu() + price * curve.each * torch.arange(1, curve.most + 1)
        best = int(total.argmin())
        if float(total[best]) < price * curve.whole:
            chosen[name] = best + 1
    return chosen


def _cost(curves: Mapping[str, Curve], ranks: Mapping[str, int]) -> float:
    return sum(curve.each * ranks[name] if name in ranks else curve.whole for name, curve in curves.items())
