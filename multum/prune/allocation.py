"""How many channels each group keeps: by share, by a common threshold, or with the least loss within budgets."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..graph import Graph
from ..graph.axes import Group, Groups, Keep
from .counts import Term, latency_terms, mac_terms, parameter_terms, total

TERMS: dict[str, Callable[[Graph, Groups], list[Term]]] = {"parameters": parameter_terms, "macs": mac_terms, "latency": latency_terms}
ALLOCATIONS = ("uniform", "global", "budget", "sensitivity")
_TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Budget:
    """The share of a cost that may be left."""

    name: str
    share: float
    terms: list[Term]
    whole: float
    of: dict[str, list[Term]] = field(default_factory=dict)  # the terms that depend on a group

    @classmethod
    def make(cls, name: str, share: float, graph: Graph, groups: Groups) -> Budget:
        terms = TERMS[name](graph, groups)
        of: dict[str, list[Term]] = {}
        for term in terms:
            for group in term.groups:
                of.setdefault(group, []).append(term)
        return cls(name, share, terms, total(terms, {}), of)

    def left(self, keep: Keep) -> float:
        """The share that is left."""
        return total(self.terms, keep) / self.whole if self.whole else 0.0

    def saved(self, keep: Keep, group: str, width: int) -> float:
        """The share that is saved when a group goes down to a width."""
        terms = self.of.get(group, [])
        return (total(terms, keep) - total(terms, {**keep, group: range(width)})) / self.whole if self.whole else 0.0


def least_loss(
    chosen: Sequence[Group],
    losses: Mapping[str, Tensor],
    widths: Mapping[str, Sequence[int]],
    rivals: Callable[[Group], Sequence[Group]],
    budgets: Sequence[Budget],
) -> dict[str, int]:
    """A width for each group that gets narrower, so that every budget is met with little loss, or as nearly as can be.

    Greedy: the step down with the least loss for what it saves of the budgets not met yet comes next. `losses` of a group are
    those of the loss when 1, 2 ... of its channels are gone [size]; `widths` are those it may have, falling; of `rivals`, the factors
    of a product, only one gets narrower.
    """
    named, kept, barred = {group.name: group for group in chosen}, dict[str, range](), set[str]()
    missing = [budget for budget in budgets if budget.left(kept) > budget.share]

    def price(name: str, place: int) -> float:
        width, before = widths[name][place], len(kept.get(name, range(named[name].size)))
        lost = _loss(losses[name], named[name].size - width) - _loss(losses[name], named[name].size - before)
        gain = sum(budget.saved(kept, name, width) for budget in missing)
        return max(lost, _TINY) / gain if gain > 0 else math.inf

    heap = [(price(name, 0), name, 0) for name in widths if widths[name]]
    heapq.heapify(heap)
    while heap and missing:
        _, name, place = heapq.heappop(heap)
        now = price(name, place)
        if name in barred or not math.isfinite(now):
            continue
        if heap and now > heap[0][0] * (1 + 1e-9):  # others have got narrower since: what it saves is less than it was
            heapq.heappush(heap, (now, name, place))
            continue
        kept[name] = range(widths[name][place])
        barred |= {rival.name for rival in rivals(named[name])}
        missing = [budget for budget in missing if budget.left(kept) > budget.share]
        if place + 1 < len(widths[name]):
            heapq.heappush(heap, (price(name, place + 1), name, place + 1))
    return {name: len(indices) for name, indices in kept.items()}


def cumulated(scores: Tensor, cumulative: bool) -> Tensor:
    """The loss when the 1, 2 ... lowest channels are gone [size]; the scores of some criteria say that themselves."""
    ordered = scores.double().sort().values
    return ordered if cumulative else ordered.clamp_min(0).cumsum(0)


def _loss(losses: Tensor, gone: int) -> float:
    return float(losses[gone - 1]) if gone else 0.0
