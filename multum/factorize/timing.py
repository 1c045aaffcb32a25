"""What chains take, measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..analyze import Latencies
from ..analyze.latency import Part, chains, whole
from ..graph import Graph, Layer
from ..graph.model import aten
from .chain import Link
from .ranks import Curve

_PROBES = 5  # ranks of each layer that are measured, evenly by cost; between them times go by it
_PLAIN: tuple[Any, ...] = ([1], [0], [1], 1)  # stride, padding, dilation and groups of a convolution that does not give them
_ROUNDS = 12  # of choosing and measuring


class Clock:
    """Milliseconds of a layer and of chains in its place, for one sample on one thread, in ONNX Runtime.

    `sketch(ranks)` gives chains of the right sizes.
    """

    def __init__(self, graph: Graph, layer: Layer, sketch: Callable[[Sequence[int]], list[Link]]):
        self.sketch, self.known = sketch, Latencies(graph).covers(layer)
        if self.known:
            self.given, self.own = whole(graph, layer)

    def times(self, *ranks: Sequence[int]) -> tuple[float, ...]:
        """Of the layer as it is, and of the chains of these ranks."""
        found = [tuple(part for link in self.sketch(each) for part in _parts(link)) for each in ranks]
        return chains(self.given, ((self.own,), *found))

    def curve(self, curve: Curve) -> Curve:
        """The curve with milliseconds in the place of its costs."""
        order = curve.costs.argsort()
        places = list(dict.fromkeys(int(order[round(share * (len(order) - 1))]) for share in np.linspace(0, 1, _PROBES)))
        own, *found = self.times(*(curve.rank(place) for place in places))
        costs = np.interp(curve.costs.numpy(), curve.costs[places].numpy(), np.maximum.accumulate(found))
        return replace(curve, costs=torch.from_numpy(costs), whole=own)


def settled(
    choose: Callable[[Mapping[str, Curve]], dict[str, int]], curves: dict[str, Curve], clocks: Mapping[str, Clock], budget: str
) -> tuple[dict[str, int], dict[str, Curve], dict[str, tuple[float, ...]]]:
    """Choices that were measured, where there are clocks, with the curves and the times of layer and chain.

    A chain that is not faster is struck out, with all that cost more, and chosen is anew; without a budget the choice stands.
    """
    times: dict[str, dict[int, tuple[float, ...]]] = {name: {} for name in clocks}
    slow: dict[str, tuple[float, ...]] = {}
    for _ in range(_ROUNDS):
        found = choose(curves)
        fresh = {name: choice for name, choice in found.items() if name in clocks and choice not in times[name]}
        for name, choice in fresh.items():
            curve = curves[name]
            own, taken = times[name][choice] = clocks[name].times(curve.rank(choice))
            if budget == "latency":  # what was interpolated is put right
                off = taken / own * curve.whole / float(curve.costs[choice])
                curve = _exact(replace(curve, costs=curve.costs * off), times[name])
            if taken >= own and budget:
                slow[name] = (own, taken)
                curve = replace(curve, costs=curve.costs.masked_fill(curve.costs >= curve.costs[choice], torch.inf))
            curves = curves | {name: curve}
        if not fresh or not budget:
            break
    if budget == "latency":  # the best of what was measured
        nothing = {name: replace(curve, costs=torch.full_like(curve.costs, torch.inf)) for name, curve in curves.items()}
        curves = {name: _exact(curve, times[name]) for name, curve in nothing.items()}
        found = choose(curves)
    measured = {name: times[name][choice] for name, choice in found.items() if choice in times.get(name, {})}
    return found, curves, {name: pair for name, pair in slow.items() if name not in found} | measured


def _exact(curve: Curve, times: Mapping[int, tuple[float, ...]]) -> Curve:
    """The curve with what was measured, times of layer and chain by choice, in the place of its costs."""
    costs = curve.costs.clone()
    for choice, (own, taken) in times.items():
        costs[choice] = taken / own * curve.whole if taken < own else torch.inf
    return replace(curve, costs=costs)


def _parts(link: Link) -> list[Part]:
    """A link as parts of a chain that is timed."""
    names = {aten.reshape.default: "reshape", aten.permute.default: "permute"}
    before: list[Part] = [(names[target], tuple(argument)) for target, argument in link.views]
    if link.operator is aten.linear.default:
        return [*before, ("linear", *link.weight.shape)]
    sizes = tuple(link.weight.shape)
    *given, groups = (*link.rest, *_PLAIN[len(link.rest) :])
    ways = [tuple(way) * (1 if len(way) > 1 else len(sizes) - 2) for way in given]
    return [*before, ("conv", sizes, ways[0], ways[1] * 2, ways[2], groups)]
