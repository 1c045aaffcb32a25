"""Criteria: how much each channel of a group matters. Functions from a graph and one of its groups to a number per channel [size].

The mean over a group is one, so that groups can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..graph import Graph, Layer
from ..graph.axes import Group, Groups

Criterion = Callable[[Graph, Groups, Group], Tensor]


def magnitude(graph: Graph, groups: Groups, group: Group) -> Tensor:
    """How strong a channel is, times the L2 norm of the weights that read it: what the next layers would lose.

    Its strength is the scale of the normalization after it, which is its standard deviation, and without one the norm
    of the weights that make it (Li et al. 2017, section 3.1, there for one layer).
    """
    return _strength(graph, groups, group, 2)


def magnitude_l1(graph: Graph, groups: Groups, group: Group) -> Tensor:
    """The same with L1 norms."""
    return _strength(graph, groups, group, 1)


def batch_norm(graph: Graph, groups: Groups, group: Group) -> Tensor:
    """The scale of the normalization alone (Liu et al. 2017, section 3); `magnitude` where a group has none."""
    scales = list(_scales(graph, groups, group, 1))
    return _normalized(_joined(scales, 1)) if scales else magnitude(graph, groups, group)


CRITERIA: dict[str, Criterion] = {function.__name__: function for function in (magnitude, magnitude_l1, batch_norm)}


def _strength(graph: Graph, groups: Groups, group: Group, order: int) -> Tensor:
    made = list(_scales(graph, groups, group, order)) or list(_norms(graph, groups, group, group.producers, order))
    read = list(_norms(graph, groups, group, group.consumers, order))
    score = torch.ones(group.size, dtype=torch.double)
    for side in (made, read):
        if side:
            score = score * _joined(side, order)
    return _normalized(score)


def _norms(graph: Graph, groups: Groups, group: Group, layers: tuple[str, ...], order: int) -> Iterator[Tensor]:
    """For each matrix or bank of filters: the norm of every channel's share of it [size]."""
    made = layers is group.producers
    for layer in _layers(groups, layers):
        weight = graph.tensor(layer.weight).detach().double()
        for dim in range(min(weight.ndim, 2) if weight.ndim > 1 else 0):
            if (layer.weight, dim) in group.members and (dim == layer.axis) is made:
                rest = [other for other in range(weight.ndim) if other != dim]
                yield _gather(groups, group, layer.weight, dim, torch.linalg.vector_norm(weight, order, rest), order)


def _scales(graph: Graph, groups: Groups, group: Group, order: int) -> Iterator[Tensor]:
    """The scales of the normalizations of a group [size]."""
    for layer in _layers(groups, group.producers):
        if layer.kind == "norm":
            yield _gather(groups, group, layer.weight, 0, graph.tensor(layer.weight).detach().double().abs(), order)


def _gather(groups: Groups, group: Group, tensor: str, dim: int, norm: Tensor, order: int) -> Tensor:
    """Norms along a tensor's dimension [n] put together for each channel of the group [size]."""
    places = groups.places(tensor, dim, group)
    inside = places >= 0
    sums = torch.zeros(group.size, dtype=torch.double).index_add(0, places[inside], norm.cpu()[inside] ** order)
    return sums.pow(1 / order)


def _joined(norms: list[Tensor], order: int) -> Tensor:
    return (torch.stack(norms) ** order).sum(0) ** (1 / order)


def _layers(groups: Groups, names: tuple[str, ...]) -> list[Layer]:
    """One layer for each weight: a weight that is used again counts once."""
    return list({groups.layers[name].weight: groups.layers[name] for name in names}.values())


def _normalized(values: Tensor) -> Tensor:
    return values / values.mean().clamp_min(1e-30)
