"""Criteria for channels: functions from what is known and a group of channels to a score for each of them [size].

The lowest scores go first; scores of one criterion can be compared between groups. Every criterion for single weights is one for
channels too: the sum over the weights that make the channel and that read it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..analyze.evidence import Evidence
from ..graph import Graph, Layer
from ..graph.axes import Group, Groups
from ..graph.axis import places
from ..graph.matrix import channel_dim, data, multiplies, to_matrix
from . import criteria
from .obs import inverse

Criterion = Callable[[Evidence, Groups, Group], Tensor]
_ROUNDS = 32  # in which the channels of a group go, and the others make good


def magnitude(evidence: Evidence, groups: Groups, group: Group) -> Tensor:
    """How strong a channel is, times the L2 norm of the weights that read it: what the next layers would lose.

    Its strength is the scale of the normalization after it, which is its standard deviation, and without one the norm
    of the weights that make it (Li et al. 2017, section 3.1, there for one layer).
    """
    return _strength(evidence.graph, groups, group, 2)


def magnitude_l1(evidence: Evidence, groups: Groups, group: Group) -> Tensor:
    """The same with L1 norms."""
    return _strength(evidence.graph, groups, group, 1)


def batch_norm(evidence: Evidence, groups: Groups, group: Group) -> Tensor:
    """The scale of the normalization alone (Liu et al. 2017, section 3); `magnitude` where a group has none."""
    scales = list(_scales(evidence.graph, groups, group, 1))
    return _normalized(_joined(scales, 1)) if scales else magnitude(evidence, groups, group)


def fpgm(evidence: Evidence, groups: Groups, group: Group) -> Tensor:
    """The sum of the distances to the other filters: those near the geometric median can be replaced (He et al. 2019, section 3.2)."""
    filters = []
    for layer, dim in _places(evidence.graph, groups, group, made=True):
        rows = evidence.graph.tensor(layer.weight).detach().double().movedim(dim, 0).flatten(1).cpu()
        places = groups.places(layer.weight, dim, group)
        filters.append(torch.stack([rows[places == channel].flatten() for channel in range(group.size)]))
    if not filters:
        return magnitude(evidence, groups, group)
    joined = torch.cat(filters, 1)
    return _normalized(torch.cdist(joined, joined).sum(1))


def activation(evidence: Evidence, groups: Groups, group: Group) -> Tensor:
    """The mean absolute value, on calibration data, of what the next layers read (Molchanov et al. 2017, section 2.2)."""
    return _read(evidence, groups, group, 0)


def apoz(evidence: Evidence, groups: Groups, group: Group) -> Tensor:
    """The share of what the next layers read that is not zero (Hu et al. 2016, section 3.1: average percentage of zeros)."""
    return _read(evidence, groups, group, 1)


def gradient(evidence: Evidence, groups: Groups, group: Group) -> Tensor:
    """The L2 norm of the gradient of the task's loss in the weights that make the channel and that read it."""
    return _total(evidence, groups, group, lambda layer: evidence.gradients[layer.weight].double().square()).sqrt()


def obs(evidence: Evidence, groups: Groups, group: Group) -> Tensor:
    """How much of the outputs of the layers that read them is lost when channels up to this one go and the others make good.

    Relative to the outputs' variance on calibration data; in rounds, the cheapest first (Hassibi & Stork 1993, for whole channels
    as in Kurtic et al. 2023, section 3.1). Where no matrix reads them, their share of the squared `magnitude`.
    """
    readers = [_Reader(evidence, groups, group, layer) for layer in _readers(evidence.graph, groups, group)]
    left, lost = torch.arange(group.size, device=evidence.device), torch.zeros((), dtype=torch.double, device=evidence.device)
    scores = torch.zeros(group.size, dtype=torch.double, device=evidence.device)
    if not readers:
        shares = magnitude(evidence, groups, group).square().sort()
        return scores.cpu().scatter_(0, shares.indices, shares.values.cumsum(0) / shares.values.sum())
    while len(left):
        costs, order = torch.stack([reader.costs(left) for reader in readers]).sum(0).sort(stable=True)
        count = math.ceil(group.size / _ROUNDS)
        gone, left = left[order[:count]], left[order[count:].sort().values]
        scores[gone] = lost + costs[:count].cumsum(0)
        lost = scores[gone[-1]]
        for reader in readers if len(left) else ():
            reader.remove(gone)
    return scores.cpu()


class _Reader:
    """The matrix of a layer and the inverse of its Hessian, from which channels of a group are taken."""

    def __init__(self, evidence: Evidence, groups: Groups, group: Group, layer: Layer):
        weight = evidence.graph.tensor(layer.weight).detach()
        gram = evidence.gram(layer)
        self.weight, self.inverse = to_matrix(layer, weight).double(), inverse(gram)
        self.whole = (self.weight @ gram * self.weight).sum().clamp_min(1e-300)
        window = weight.shape[2:].numel()
        where = groups.places(layer.weight, 1 - layer.axis, group).to(gram.device)
        found = [(where == channel).nonzero() * window + torch.arange(window, device=gram.device) for channel in range(group.size)]
        self.columns = torch.stack([rows.flatten() for rows in found])  # [channels, columns of each]

    def costs(self, channels: Tensor) -> Tensor:
        """What each of these channels would cost if it went next."""
        index = self.columns[channels]
        corners = self.inverse[:, index[:, :, None], index[:, None, :]]
        own = self.weight[:, :, index].permute(0, 2, 3, 1)  # [groups, channels, columns of each, outputs]
        found: Tensor = (own * torch.linalg.solve(corners, own)).sum((0, 2, 3)) / self.whole
        return found

    def remove(self, channels: Tensor) -> None:
        """Takes these channels out; the matrices shrink, for nobody asks about them again."""
        index, stays = self.columns[channels].flatten(), torch.ones(self.weight.shape[2], dtype=torch.bool, device=self.weight.device)
        stays[index] = False
        left = stays.nonzero().flatten()
        across = self.inverse[:, index[:, None], left]
        rest = torch.linalg.solve(self.inverse[:, index[:, None], index], across)
        self.weight = self.weight[:, :, left] - self.weight[:, :, index] @ rest
        self.inverse = self.inverse[:, left[:, None], left] - across.mT @ rest
        self.columns = (stays.cumsum(0) - 1)[self.columns]


def _total(evidence: Evidence, groups: Groups, group: Group, single: Callable[[Layer], Tensor]) -> Tensor:
    """The sum over the weights of a channel of a score for single weights."""
    total = torch.zeros(group.size, dtype=torch.double)
    for made in (True, False):
        for layer, dim in _places(evidence.graph, groups, group, made):
            values = single(layer)
            others = [other for other in range(values.ndim) if other != dim]
            total += _gather(groups.places(layer.weight, dim, group), group, values.sum(others), 1)
    return total


def _summed(criterion: criteria.Criterion) -> Criterion:
    def scores(evidence: Evidence, groups: Groups, group: Group) -> Tensor:
        return _total(evidence, groups, group, lambda layer: criterion(evidence, layer))

    scores.__doc__ = criterion.__doc__
    return scores


CRITERIA: dict[str, Criterion] = {name: _summed(criterion) for name, criterion in criteria.CRITERIA.items()}
CRITERIA |= {f.__name__: f for f in (magnitude, magnitude_l1, batch_norm, fpgm, activation, apoz, gradient, obs)}
CUMULATIVE = ("obs",)  # whose scores are the loss when all lower channels are gone as well
NEEDS = criteria.NEEDS | {"activation": ("calibration",), "apoz": ("calibration",)}


def _strength(graph: Graph, groups: Groups, group: Group, order: int) -> Tensor:
    made = list(_scales(graph, groups, group, order)) or list(_norms(graph, groups, group, True, order))
    read = list(_norms(graph, groups, group, False, order))
    score = torch.ones(group.size, dtype=torch.double)
    for side in (made, read):
        if side:
            score = score * _joined(side, order)
    return _normalized(score)


def _read(evidence: Evidence, groups: Groups, group: Group, which: int) -> Tensor:
    """A statistic of the values that matrices read, its mean over the places of a channel, summed over the readers."""
    found = []
    for layer in _readers(evidence.graph, groups, group):
        where = places(groups.results[data(layer)][channel_dim(layer)], group.axis)
        found.append(_gather(where, group, evidence.activations[layer.name][which], 1))
    return _normalized(torch.stack(found).sum(0)) if found else magnitude(evidence, groups, group)


def _readers(graph: Graph, groups: Groups, group: Group) -> list[Layer]:
    """The layers that multiply their matrices by channels of the group."""
    found = [layer for layer, _ in _places(graph, groups, group, made=False) if multiplies(layer)]
    return [layer for layer in found if bool((places(groups.results[data(layer)][channel_dim(layer)], group.axis) >= 0).any())]


def _norms(graph: Graph, groups: Groups, group: Group, made: bool, order: int) -> Iterator[Tensor]:
    """For each matrix or bank of filters: the norm of every channel's share of it [size]."""
    for layer, dim in _places(graph, groups, group, made):
        weight = graph.tensor(layer.weight).detach().double()
        rest = [other for other in range(weight.ndim) if other != dim]
        yield _gather(groups.places(layer.weight, dim, group), group, torch.linalg.vector_norm(weight, order, rest), order)


def _scales(graph: Graph, groups: Groups, group: Group, order: int) -> Iterator[Tensor]:
    """The scales of the normalizations of a group [size]."""
    for layer in _layers(groups, group.producers):
        if layer.kind == "norm":
            scale = graph.tensor(layer.weight).detach().double().abs()
            yield _gather(groups.places(layer.weight, 0, group), group, scale, order)


def _places(graph: Graph, groups: Groups, group: Group, made: bool) -> Iterator[tuple[Layer, int]]:
    """The matrices and banks of filters that make the channels of a group, or that read them, with the dimension in which they lie."""
    for layer in _layers(groups, group.producers if made else group.consumers):
        ndim = graph.tensor(layer.weight).ndim
        for dim in range(min(ndim, 2) if ndim > 1 else 0):
            if (layer.weight, dim) in group.members and (dim == layer.axis) is made:
                yield layer, dim


def _gather(where: Tensor, group: Group, norm: Tensor, order: int) -> Tensor:
    """Norms along a dimension [n] put together for each channel of the group [size], where each index belongs to a channel or none (-1)."""
    inside = where >= 0
    sums = torch.zeros(group.size, dtype=torch.double).index_add(0, where[inside], norm.double().cpu()[inside] ** order)
    return sums.pow(1 / order)


def _joined(norms: list[Tensor], order: int) -> Tensor:
    return (torch.stack(norms) ** order).sum(0) ** (1 / order)


def _layers(groups: Groups, names: tuple[str, ...]) -> list[Layer]:
    """One layer for each weight: a weight that is used again counts once."""
    return list({groups.layers[name].weight: groups.layers[name] for name in names}.values())


def _normalized(values: Tensor) -> Tensor:
    return values / values.mean().clamp_min(1e-30)
