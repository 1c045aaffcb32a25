"""The ranks of every layer: by the energy that is kept, or as a budget over all layers at once allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import StepError

_HALVINGS = 60


@dataclass(frozen=True, eq=False)
class Curve:
    """What a layer loses and costs at each choice of its ranks.

    `lost` [choices] is the share of the energy of its outputs that is lost, `costs` [choices] what the factors cost, `ranks`
    [choices, parts] are the choices; `whole` is the cost of the layer as it is. `full` are the ranks of which more are of no use, the
    largest choices where it is not given; `note` says why there are no choices, or not all.
    """

    lost: Tensor
    costs: Tensor
    ranks: Tensor
    whole: float
    full: tuple[int, ...] = ()
    note: str = ""

    @property
    def pays(self) -> Tensor:
        """Which choices cost less than the layer [choices]."""
        return self.costs < self.whole

    @property
    def least(self) -> float:
        """What the cheapest choice costs, or the layer, when that is cheaper."""
        return min(self.whole, float(self.costs.min()))

    @property
    def of(self) -> list[int]:
        """The full ranks."""
        return list(self.full) or [int(rank) for rank in self.ranks.amax(0)]

    def rank(self, choice: int) -> list[int]:
        return [int(rank) for rank in self.ranks[choice]]

    def nearest(self, ranks: Sequence[int]) -> int:
        """The choice nearest to these ranks."""
        return int((self.ranks - torch.tensor(ranks)).abs().sum(1).argmin())


def lost(energy: Tensor) -> Tensor:
    """The share of the energy that is lost at each rank from 1 on [rank], of squared singular values, largest first [rank]."""
    total = energy.sum().clamp(min=torch.finfo(energy.dtype).tiny)
    return (1 - energy.cumsum(0) / total).clamp(min=0)


def one(energy: Tensor, whole: float, each: float) -> Curve:
    """The curve of a layer with one rank, of squared singular values [rank], when a rank costs `each`."""
    ranks = torch.arange(1, len(energy) + 1)
    return Curve(lost(energy).cpu(), each * ranks.double(), ranks[:, None], whole)


def two(energies: Sequence[Tensor], whole: float, costs: Sequence[float]) -> Curve:
    """The curve of a layer with two ranks a and b that costs x a + y a b + z b with `costs` x, y, z.

    What both lose together is at most the sum of what each loses alone (De Lathauwer, De Moor & Vandewalle 2000, property 10).
    """
    first, second = (lost(energy).cpu() for energy in energies)
    a, b = torch.meshgrid(*(torch.arange(1, len(part) + 1) for part in (first, second)), indexing="ij")
    cost = costs[0] * a + costs[1] * a * b + costs[2] * b.double()
    return Curve((first[:, None] + second).clamp(max=1).flatten(), cost.flatten(), torch.stack([a.flatten(), b.flatten()], 1), whole)


def by_energy(curve: Curve, share: float) -> int:
    """The cheapest choice that keeps this share of the energy; when none does, the one that keeps most."""
    enough = curve.lost <= 1 - share + 1e-12
    return int(curve.costs.masked_fill(~enough, torch.inf).argmin()) if bool(enough.any()) else int(curve.lost.argmin())


def by_budget(curves: Mapping[str, Curve], share: float) -> dict[str, int]:
    """The choices that lose least, each layer's share of energy summed, when all layers cost at most `share` of what they do.

    A layer that stays whole is left out. One price for cost is sought at which every layer chooses for itself (Everett
    1963); what that leaves of the budget goes where it saves most for what it costs. Raises
    StepError when even the cheapest ranks cost too much.
    """
    whole = sum(curve.whole for curve in curves.values())
    least = sum(curve.least for curve in curves.values())
    if least > share * whole:
        told = f"A share of {share} is out of reach: at the cheapest ranks everywhere {least / whole:.3f} is left."
        raise StepError(told, "a share above that", "ask for less, or name more layers in include")
    low, high = 0.0, 1.0
    while _cost(curves, _choose(curves, high / whole)) > share * whole:
        high *= 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if _cost(curves, _choose(curves, middle / whole)) <= share * whole else (middle, high)
    return _filled(curves, _choose(curves, high / whole), share * whole)


def _filled(curves: Mapping[str, Curve], choices: dict[str, int], budget: float) -> dict[str, int]:
    """The same with better choices while some fit: the one that saves most for what it costs comes first."""
    choices = dict(choices)
    while True:
        left, best = budget - _cost(curves, choices), (0.0, "", 0)
        for name, choice in choices.items():
            curve = curves[name]
            lost, costs = (torch.cat([part, torch.tensor([end])]) for part, end in ((curve.lost, 0.0), (curve.costs, curve.whole)))
            more = costs - costs[choice]
            saved = (lost[choice] - lost).masked_fill((more <= 0) | (more > left), 0) / more.clamp_min(1e-30)
            best = max(best, (float(saved.max()), name, int(saved.argmax())))
        if best[0] <= 0:
            return choices
        choices[best[1]] = best[2]
        if best[2] == len(curves[best[1]].lost):
            del choices[best[1]]


def _choose(curves: Mapping[str, Curve], price: float) -> dict[str, int]:
    """The choice of each layer with the least loss plus price times cost, where that beats the whole layer."""
    chosen = {}
    for name, curve in curves.items():
        total = (curve.lost + price * curve.costs).masked_fill(~curve.pays, torch.inf)
        best = int(total.argmin())
        if float(total[best]) < price * curve.whole:
            chosen[name] = best
    return chosen


def _cost(curves: Mapping[str, Curve], choices: Mapping[str, int]) -> float:
    return sum(float(curve.costs[choices[name]]) if name in choices else curve.whole for name, curve in curves.items())
