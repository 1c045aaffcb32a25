"""How much the outputs change when a group of channels gets narrower, measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..graph import Graph
from ..graph.axes import Group, Groups
from ..graph.matrix import multiplies
from ..task import Task, call, first, tensors
from ..train import arrange

_PROBES = (0.25, 0.5, 0.75)  # shares of a group that are left out; all of it as well


@torch.no_grad()
def sensitivity(
    graph: Graph, groups: Groups, chosen: Sequence[Group], scores: Mapping[str, Tensor], task: Task, samples: int
) -> dict[str, Tensor]:
    """For each group, how much the outputs change when its 1, 2 ... lowest channels are not read [size]: the mean squared change
    relative to the outputs' mean square, measured on calibration data at some shares, with straight lines between them."""
    graph = graph.copy().eval()
    device = next((tensor.device for _, tensor in graph.named_tensors()), torch.device("cpu"))
    batches = [arrange(inputs, device) for inputs, _ in first(task, "calibration", samples)]
    before = [list(_outputs(call(graph, inputs))) for inputs in batches]
    found = {}
    for group in chosen:
        order = scores[group.name].sort(stable=True).indices
        points = [(0, 0.0)]
        for count in sorted({math.ceil(share * group.size) for share in _PROBES} | {group.size}):
            with _Unread(graph, groups, group, order[:count]):
                after = [list(_outputs(call(graph, inputs))) for inputs in batches]
            points.append((count, max(points[-1][1], _change(before, after))))
        found[group.name] = _between(points, group.size)
    return found


class _Unread:
    """Inside, the layers that read these channels of a group read zeros."""

    def __init__(self, graph: Graph, groups: Groups, group: Group, channels: Tensor):
        self.rows = list[tuple[Tensor, Tensor]]()
        for name in dict.fromkeys(group.consumers):
            layer = groups.layers[name]
            weight = graph.tensor(layer.weight)
            for tensor, dim in group.members:
                if tensor == layer.weight and dim != layer.axis and (multiplies(layer) or layer.kind in ("conv", "rnn")):
                    gone = torch.isin(groups.places(tensor, dim, group), channels).to(weight.device)
                    self.rows.append((weight, gone.reshape([-1 if d == dim else 1 for d in range(weight.ndim)])))

    def __enter__(self) -> None:
        self.kept = [weight.detach().clone() for weight, _ in self.rows]
        for weight, gone in self.rows:
            weight.masked_fill_(gone, 0)

    def __exit__(self, *exception: Any) -> None:
        for (weight, _), value in zip(self.rows, self.kept, strict=True):
            weight.copy_(value)


def _outputs(value: Any) -> list[Tensor]:
    return [tensor.double() for tensor in tensors(value) if tensor.is_floating_point()]


def _change(before: list[list[Tensor]], after: list[list[Tensor]]) -> float:
    pairs = [pair for olds, news in zip(before, after, strict=True) for pair in zip(olds, news, strict=True)]
    change, power = sum(float((new - old).square().sum()) for old, new in pairs), sum(float(old.square().sum()) for old, _ in pairs)
    return change / max(power, 1e-300)


def _between(points: Sequence[tuple[int, float]], size: int) -> Tensor:
    counts, values = zip(*points, strict=True)
    return torch.from_numpy(np.interp(np.arange(1, size + 1), counts, values))
