"""How much the outputs of the network change when one layer has lower ranks, measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..graph import Graph, Layer
from ..prune.deviation import Deviation
from ..prune.recover import inputs
from ..task import Task
from .ranks import Curve

_SHARES = (0.0, 0.25, 0.5, 0.75)  # of a layer's cost: at the best ranks within these it is tried; at the least, the cheapest
TRIALS = 32  # samples


@torch.no_grad()
def by_outputs(
    graph: Graph, task: Task, curves: Mapping[str, Curve], layers: Mapping[str, Layer], dense: Callable[[Layer, Sequence[int]], Tensor]
) -> dict[str, Curve]:
    """The curves with what the outputs lose, of each layer alone, in the place of energy.

    As `Deviation` has it, on calibration data, at some ranks, with straight lines over the energy between. `dense` gives the weight that a
    layer has at these ranks.
    """
    graph = graph.copy()
    deviation, found = Deviation(graph, inputs(task, TRIALS, graph)), {}
    for name, curve in curves.items():
        layer = layers[name]
        kept, seen = graph.tensor(layer.weight).detach().clone(), [(0.0, 0.0)]
        for place in dict.fromkeys(_within(curve, share) for share in _SHARES):
            graph.tensor(layer.weight).copy_(dense(layer, curve.rank(place)).movedim(0, layer.axis))
            seen.append((float(curve.lost[place]), deviation(graph)))
        graph.tensor(layer.weight).copy_(kept)
        energies, off = (np.array(part) for part in zip(*sorted(seen), strict=True))
        off = np.maximum.accumulate(off)
        lost = np.interp(curve.lost.numpy(), energies, off)
        found[name] = replace(curve, lost=torch.from_numpy(lost))
    return found


def _within(curve: Curve, share: float) -> int:
    """The choice that loses least at this share of the layer's cost, or the cheapest."""
    fits = curve.costs <= share * curve.whole
    return int(curve.lost.masked_fill(~fits, torch.inf).argmin()) if bool(fits.any()) else int(curve.costs.argmin())
