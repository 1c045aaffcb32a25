"""How much the outputs change when a group of channels gets narrower, measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ..graph import Graph
from ..graph.axes import Group, Groups
from ..graph.matrix import multiplies
from ..task import Task
from .deviation import Deviation
from .recover import inputs

_PROBES = (0.25, 0.5, 0.75)  # shares of a group that are left out; all of it as well


@torch.no_grad()
def sensitivity(
    graph: Graph, groups: Groups, chosen: Sequence[Group], scores: Mapping[str, Tensor], task: Task, samples: int
) -> dict[str, Tensor]:
    """For each group, how far the outputs are off when its 1, 2 ... lowest channels are not read [size].

    As `Deviation` has it, on calibration data, at some shares with straight lines between.
    """
    graph = graph.copy()
    deviation = Deviation(graph, inputs(task, samples, graph))
    found = {}
    for group in chosen:
        order = scores[group.name].sort(stable=True).indices
        counts, values = [0], [0.0]
        for count in sorted({math.ceil(share * group.size) for share in _PROBES} | {group.size}):
            with _unread(graph, groups, group, order[:count]):
                counts.append(count)
                values.append(max(values[-1], deviation(graph)))
        found[group.name] = torch.from_numpy(np.interp(np.arange(1, group.size + 1), counts, values))
    return found


@contextmanager
def _unread(graph: Graph, groups: Groups, group: Group, channels: Tensor) -> Iterator[None]:
    """Inside, the layers that read these channels of a group read zeros."""
    kept: dict[str, Tensor] = {}
    for name in dict.fromkeys(group.consumers):
        layer = groups.layers[name]
        for tensor, dim in group.members:
            if tensor == layer.weight and dim != layer.axis and (multiplies(layer) or layer.kind in ("conv", "rnn")):
                weight = graph.tensor(tensor)
                kept.setdefault(tensor, weight.detach().clone())
                gone = torch.isin(groups.places(tensor, dim, group), channels).to(weight.device)
                weight.masked_fill_(gone.reshape([-1 if other == dim else 1 for other in range(weight.ndim)]), 0)
    try:
        yield
    finally:
        for tensor, value in kept.items():
            graph.tensor(tensor).copy_(value)
