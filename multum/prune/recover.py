"""Recovery without training: layer by layer, what was cut is made good on calibration data, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import Graph, Layer, layers
from ..graph.matrix import data, from_matrix, multiplies, pairs, to_matrix
from ..graph.model import aten, read
from ..graph.sweep import Sweep, live_bytes
from ..task import Task, batch_size, calibration, rows

MEMORY = 1 << 29  # bytes of results that are held at once; less samples are taken where they do not fit


@dataclass
class Errors:
    """What a layer reads and by how much its outputs are off, in sums over `count` columns.

    `gram` is X X^T [groups, height, height], `pull` is E X^T [groups, outputs, height] with the missing outputs E; both about
    the means [groups, height] and [groups, outputs] where the layer can take up a shift.
    """

    gram: Tensor
    pull: Tensor
    inputs: Tensor
    missing: Tensor


Fit = Callable[[Tensor, Errors], Tensor]  # a layer's matrix [groups, outputs, height] -> a better one


def recover(
    graph: Graph, original: Graph, task: Task, samples: int, fits: Mapping[str, Fit], select: Callable[[fx.Node, Any], Any]
) -> None:
    """Refits the weights of these layers, and the statistics of every batch norm, each seeing what those before it now make.

    `original` has operators of the same names; `select` gives of a result in it what the graph still has.
    """
    batches = list(_batches(task, samples, live_bytes(graph) + live_bytes(original)))
    known = {layer.node: layer for layer in layers(graph) if layer.name in fits and multiplies(layer)}
    new, old = Sweep(graph, batches), Sweep(original, batches)
    twins = iter(old)
    for node in new:
        twin = next(twin for twin in twins if twin.name == node.name)
        if node in known:
            wanted = [select(twin, value) for value in old.run(twin)]
            _refit(graph, known[node], new, wanted, fits[known[node].name])
        elif node.target is aten.batch_norm.default:
            _restate(graph, node, new)


def _refit(graph: Graph, layer: Layer, sweep: Sweep, wanted: list[Tensor], fit: Fit) -> None:
    weight = graph.tensor(layer.weight).detach()
    shifts = layer.bias is not None or _feeds_norm(layer.node)
    given = sweep.run(layer.node)
    errors = _sums((layer, weight.shape), sweep.values[data(layer)], [y - now for y, now in zip(wanted, given, strict=True)], shifts)
    before = to_matrix(layer, weight)
    after = fit(before, errors)
    graph.set_tensor(layer.weight, from_matrix(layer, after, weight.shape))
    if layer.bias is not None:
        change = errors.missing - ((after - before).double() @ errors.inputs[..., None])[..., 0]
        graph.set_tensor(layer.bias, graph.tensor(layer.bias).detach() + change.flatten().to(weight.dtype))
    del sweep.values[layer.node]  # it has to run anew


def _sums(of: tuple[Layer, torch.Size], values: list[Tensor], missing: list[Tensor], shifts: bool) -> Errors:
    layer, shape = of
    gram = pull = inputs = outputs = torch.zeros((), dtype=torch.double, device=values[0].device)
    count = 0
    for value, error in zip(values, missing, strict=True):
        for x, e in pairs(layer, value, error, shape):
            gram, pull = gram + (x @ x.transpose(1, 2)).double(), pull + (e @ x.transpose(1, 2)).double()
            inputs, outputs = inputs + x.sum(2).double(), outputs + e.sum(2).double()
            count += x.shape[2]
    inputs, outputs = inputs / count, outputs / count
    if shifts:
        gram = gram - count * inputs[:, :, None] * inputs[:, None]
        pull = pull - count * outputs[:, :, None] * inputs[:, None]
    return Errors(gram, pull, inputs, outputs)


def _restate(graph: Graph, node: fx.Node, sweep: Sweep) -> None:
    """Sets the statistics of a batch norm to those of what it reads now."""
    mean, variance = (read(node, name) for name in ("running_mean", "running_var"))
    values = sweep.values[node.args[0]]  # type: ignore[index]
    if not all(isinstance(part, fx.Node) and part.op == "get_attr" for part in (mean, variance)):
        return
    others = [dim for dim in range(values[0].ndim) if dim != 1]
    count = sum(value[:, 0].numel() for value in values)
    centre = sum(value.double().sum(others) for value in values) / count
    shape = [-1 if dim == 1 else 1 for dim in range(values[0].ndim)]
    spread = sum((value.double() - centre.reshape(shape)).square().sum(others) for value in values) / max(count - 1, 1)
    for part, value in ((mean, centre), (variance, spread)):
        graph.set_tensor(str(part.target), value.to(graph.tensor(str(part.target)).dtype))


def _feeds_norm(node: fx.Node) -> bool:
    return [user.target for user in node.users] == [aten.batch_norm.default]


def _batches(task: Task, samples: int, each: int) -> Iterator[Any]:
    """Inputs of calibration samples, as many as fit in memory when one needs so many bytes."""
    left = max(1, min(samples, MEMORY // max(each, 1)))
    for inputs in calibration(task, left):
        size = batch_size(inputs)
        yield rows(inputs, size, 0, left) if size > left else inputs
        left -= size
