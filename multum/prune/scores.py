"""Criteria: how much each channel of a group matters. Functions from a graph and one of its groups to a number per channel [size].

The mean over a group is one, so that groups can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..graph import Graph, Layer
from ..graph.axes import Group, Groups, output_dim
from ..graph.model import aten, read

Criterion = Callable[[Graph, Groups, Group], Tensor]


def magnitude(graph: Graph, groups: Groups, group: Group) -> Tensor:
    """L2 norm of the weights that make a channel, as batch normalization scales them, and of those that read it.

    Li et al. 2017, section 3.1, taken over everything that is cut together.
    """
    return _mean_of_norms(graph, groups, group, 2)


def magnitude_l1(graph: Graph, groups: Groups, group: Group) -> Tensor:
    """The same with the L1 norm."""
    return _mean_of_norms(graph, groups, group, 1)


def batch_norm(graph: Graph, groups: Groups, group: Group) -> Tensor:
    """The scale of batch normalization (Liu et al. 2017, section 3); `magnitude` where a group has none."""
    names = {layer.weight for layer in _layers(groups, group.producers) if layer.node.target is aten.batch_norm.default}
    scales = [_gather(groups, group, name, 0, graph.tensor(name).detach().double().abs(), 1) for name in sorted(names)]
    return _normalized(torch.stack(scales).sum(0)) if scales else magnitude(graph, groups, group)


CRITERIA: dict[str, Criterion] = {function.__name__: function for function in (magnitude, magnitude_l1, batch_norm)}


def _mean_of_norms(graph: Graph, groups: Groups, group: Group, order: int) -> Tensor:
    norms = list(_norms(graph, groups, group, order))
    return _normalized(torch.stack([_normalized(norm) for norm in norms]).sum(0)) if norms else torch.ones(group.size)


def _norms(graph: Graph, groups: Groups, group: Group, order: int) -> Iterator[Tensor]:
    """For each matrix or filter bank that makes or reads the group: the norm of every channel's share of it."""
    for layer in _layers(groups, (*group.producers, *group.consumers)):
        weight = graph.tensor(layer.weight).detach().double()
        if weight.ndim < 2:
            continue
        for dim in (0, 1):
            if (layer.weight, dim) in group.members:
                rest = [other for other in range(weight.ndim) if other != dim]
                norm = torch.linalg.vector_norm(weight, order, rest)
                if dim == output_dim(layer):
                    norm = norm * _gain(graph, layer, norm)
                yield _gather(groups, group, layer.weight, dim, norm, order)


def _gather(groups: Groups, group: Group, tensor: str, dim: int, norm: Tensor, order: int) -> Tensor:
    """Norms along a tensor's dimension [n] put together for each channel of the group [size]."""
    places = groups.places(tensor, dim, group).to(norm.device)
    inside = places >= 0
    sums = torch.zeros(group.size, dtype=norm.dtype, device=norm.device).index_add(0, places[inside], norm[inside] ** order)
    return (sums ** (1 / order)).cpu()


def _gain(graph: Graph, layer: Layer, norm: Tensor) -> Tensor:
    """What batch normalization after the layer multiplies each output by; one without it."""
    follower = next(iter(layer.node.users))
    if follower.target is not aten.batch_norm.default or len(layer.node.users) > 1:
        return torch.ones_like(norm)
    variance, scale = (graph.tensor(str(read(follower, name).target)).detach().double() for name in ("running_var", "weight"))
    return scale.abs() / torch.sqrt(variance + read(follower, "eps"))


def _layers(groups: Groups, names: tuple[str, ...]) -> list[Layer]:
    return [groups.layers[name] for name in dict.fromkeys(names)]


def _normalized(values: Tensor) -> Tensor:
    return values / values.mean().clamp_min(1e-30)
