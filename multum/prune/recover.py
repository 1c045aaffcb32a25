"""Recovery without training: layer by layer, what was cut is made good on calibration data, in one pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import Graph, Layer, layers
from ..graph.axes import Keep, axes
from ..graph.matrix import data, from_matrix, multiplies, pairs, to_matrix
from ..graph.model import aten, read
from ..graph.sweep import Sweep, live_bytes
from ..task import Task, batch_size, calibration, rows
from .deviation import Deviation
from .obs import restored, shrunk

MEMORY = 1 << 31  # bytes of results that are held at once; less samples are taken where they do not fit
_STEADY = 1e-4  # of the square of an input's mean: so much is added to its variance, or what hardly varies would get large weights
_LITTLE = 1e-3  # of the variance that a batch norm knows


@dataclass
class Errors:
    """What a layer reads and by how much its outputs are off, in sums over `count` columns.

    `gram` is X X^T [groups, height, height], `pull` is E X^T [groups, outputs, height] with the missing outputs E; both `shrunk`, and about
    the means [groups, height] and [groups, outputs] where the layer can take up a shift.
    """

    gram: Tensor
    pull: Tensor
    inputs: Tensor
    missing: Tensor


Select = Callable[[fx.Node, Tensor], Tensor]  # a node of the original and its result -> what the graph still has of it
Fit = Callable[[Tensor, Errors], Tensor]  # a layer's matrix [groups, outputs, height] -> a better one
# a layer's matrix [outputs, height] and second moments of its columns -> what could take its place, and the matrix that this makes
Replacement = Callable[[Tensor, Tensor], tuple[Any, Tensor]]
Replaced = dict[str, tuple[Any, Tensor]]  # the same by the layer's name


def _same(node: fx.Node, value: Tensor) -> Tensor:
    return value


def recover(graph: Graph, original: Graph, batches: Sequence[Any], fits: Mapping[str, Fit], select: Select) -> None:
    """Refits the weights of these layers, and moves the statistics of every batch norm, each seeing what those before it now make.

    What comes from an operator of `original` has its name; `select` gives of a result in it what the graph still has.
    """
    known = {layer.node: layer for layer in layers(graph) if layer.name in fits}
    new, old = Sweep(graph, batches), Sweep(original, batches)
    twins, names = iter(old), {node.name for node in original.fx.nodes}
    for node in new:
        if node.name not in names:
            continue  # an operator that the cut put in
        twin = next(twin for twin in twins if twin.name == node.name)
        if node in known:
            wanted = [select(twin, value) for value in old.run(twin)]
            _refit(graph, known[node], new, wanted, fits[known[node].name])
        elif node.target is aten.batch_norm.default:
            source, target = node.all_input_nodes[0], twin.all_input_nodes[0]
            _restate(graph, node, new.values[source], [select(target, value) for value in old.values[target]])


def recover_cut(graph: Graph, original: Graph, keep: Keep, task: Task, samples: int) -> dict[str, Any]:
    """After `surgery.cut(graph, keep)` the layers that read what was cut are fitted to what they gave in `original`."""
    groups = axes(original)
    readers = {name for cut in keep for name in groups[cut].consumers}

    def select(node: fx.Node, value: Tensor) -> Tensor:
        for dim, axis in enumerate(groups.results[node]):
            if groups.size(axis, keep) != axis.size == value.shape[dim]:  # else the axis is one with that of the samples
                value = value.index_select(dim, groups.mask(axis, keep).nonzero().flatten().to(value.device))
        return value

    return recover_judged(graph, original, (task, samples), dict.fromkeys(readers, least_squares), select)


def recover_judged(
    graph: Graph, original: Graph, data: tuple[Task, int], fits: Mapping[str, Fit], select: Select = _same
) -> dict[str, Any]:
    """Fits these layers, those of them that can be, on so many samples of the task's calibration data.

    A quarter of them judges: where fits do worse than none, which happens where errors add up over many layers, half of the change is
    made, or only biases and statistics are set, or nothing at all.
    Returns which it was, and how far the outputs were off before and are after.
    """
    batches = inputs(*data, graph, original)
    fitted = {layer.name: fits[layer.name] for layer in refittable(graph) if layer.name in fits}
    parts = [
        (rows(batch, size, 0, size - size // 4), rows(batch, size, size - size // 4, size))
        for batch in batches
        if (size := batch_size(batch))
    ]
    deviation = Deviation(original, [held for _, held in parts if batch_size(held)] or batches)
    before = deviation(graph)
    kept = {name: value.detach().clone() for name, value in graph.named_tensors()}
    halves: dict[str, Fit] = {name: partial(_half, fit) for name, fit in fitted.items()}
    others: dict[str, Fit] = dict.fromkeys(fitted, _unchanged)
    ways = [("least squares", fitted), ("half of least squares", halves), ("biases and statistics", others)]
    for way, found in ways if fitted else ways[2:]:
        recover(graph, original, [own for own, _ in parts], found, select)
        if (after := deviation(graph)) < before:
            return {"recovery": way, "off_before": before, "off_after": after}
        for name, value in kept.items():
            graph.set_tensor(name, value)
    return {"recovery": "none", "off_before": before, "off_after": before}


def replaced(
    graph: Graph, original: Graph, data: tuple[Task, int], first: Replaced, ways: Mapping[str, Replacement]
) -> tuple[Replaced, dict[str, Any]]:
    """What takes the places of layers, each fitted anew to what the layer gave in `original` and on what those before it make by now.

    (Zhang et al. 2015, section 3.3.) Biases and statistics of `graph` move along, in place. Where that does worse than `first` it is
    not done (`recover_judged`, which tells the measures).
    """
    known, made, near = {layer.name: layer for layer in layers(graph)}, dict(first), graph.copy()
    for name, (_, matrix) in first.items():
        weight = graph.tensor(known[name].weight)
        near.set_tensor(known[name].weight, from_matrix(known[name], matrix[None], weight.shape).to(weight))

    def fit(name: str, matrix: Tensor, errors: Errors) -> Tensor:
        made[name] = ways[name](least_squares(matrix, errors)[0].double(), errors.gram[0])
        return made[name][1][None].to(matrix)

    measured = recover_judged(near, original, data, {name: partial(fit, name) for name in ways})
    for name, value in near.named_tensors():
        graph.set_tensor(name, value)
    return made if "least squares" in measured["recovery"] else first, measured


def refittable(graph: Graph) -> list[Layer]:
    """The layers whose weights can be fitted: they multiply a matrix that nobody else uses, and their bias is theirs alone."""
    known = layers(graph)
    uses = Counter(name for layer in known for name in (layer.weight, layer.bias) if name)
    own = [layer for layer in known if uses[layer.weight] == 1 and uses[layer.bias or ""] < 2]
    return [layer for layer in own if multiplies(layer) and layer.quantizer() is None]


def inputs(task: Task, samples: int, *graphs: Graph) -> list[Any]:
    """Inputs of calibration samples, as many as fit in memory when all results of these graphs are held for each."""
    left, found = max(1, min(samples, MEMORY // max(1, sum(map(live_bytes, graphs))))), []
    for batch in calibration(task, left):
        size = batch_size(batch)
        found.append(rows(batch, size, 0, left) if size > left else batch)
        left -= size
    return found


def least_squares(matrix: Tensor, errors: Errors) -> Tensor:
    return restored(matrix, errors.gram, torch.zeros_like(matrix, dtype=torch.bool), errors.pull)


def _half(fit: Fit, matrix: Tensor, errors: Errors) -> Tensor:
    return fit(matrix, replace(errors, pull=errors.pull / 2))


def _unchanged(matrix: Tensor, errors: Errors) -> Tensor:
    return matrix


def _refit(graph: Graph, layer: Layer, sweep: Sweep, wanted: list[Tensor], fit: Fit) -> None:
    weight = graph.tensor(layer.weight).detach()
    shifts = layer.bias is not None or _feeds_norm(layer.node)
    given = sweep.run(layer.node)
    if any(y.shape != now.shape for y, now in zip(wanted, given, strict=True)):
        return  # channels that went lie along the samples: what is left of them is not told apart
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
    count, about = 0, None
    for value, error in zip(values, missing, strict=True):
        for x, e in pairs(layer, value, error, shape):
            if shifts:  # about a mean that is nearly right: about zero, what varies little would be lost in single precision
                about = x.mean(2, keepdim=True) if about is None else about
                x = x - about
            gram, pull = gram + (x @ x.transpose(1, 2)).double(), pull + (e @ x.transpose(1, 2)).double()
            inputs, outputs = inputs + x.sum(2).double(), outputs + e.sum(2).double()
            count += x.shape[2]
    inputs, outputs = inputs / count, outputs / count
    if about is not None:
        gram = gram - count * inputs[:, :, None] * inputs[:, None]
        pull = pull - count * outputs[:, :, None] * inputs[:, None]
        inputs = inputs + about[:, :, 0].double()
        gram = gram + torch.diag_embed(_STEADY * count * inputs.square())
    return Errors(*shrunk(gram, pull, count), inputs, outputs)


def _restate(graph: Graph, node: fx.Node, values: list[Tensor], wanted: list[Tensor]) -> None:
    """Moves the statistics of a batch norm along with those of what it reads, away from those of what it should read."""
    names = [str(part.target) for name in ("running_mean", "running_var") if isinstance(part := read(node, name), fx.Node)]
    if len(names) < 2 or any(name not in dict(graph.named_tensors()) for name in names):
        return
    (mean, variance), (centre, spread) = _moments(values), _moments(wanted)
    old = [graph.tensor(name).double() for name in names]
    least = _LITTLE * (old[1] + float(read(node, "eps")))  # what varies less here than this says nothing
    wider = torch.where(variance > 0, (variance + least) / (spread + least), (spread < least).double())  # a constant: its bias
    now = (mean - (centre - old[0]) * wider.sqrt(), old[1] * wider)
    for name, value in zip(names, now, strict=True):
        graph.set_tensor(name, value.to(graph.tensor(name).dtype))


def _moments(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel."""
    others = [dim for dim in range(values[0].ndim) if dim != 1]
    counts = torch.tensor([[value[:, 0].numel()] for value in values], device=values[0].device)
    spreads, centres = (
        torch.stack(found).double() for found in zip(*(torch.var_mean(value, others, correction=0) for value in values), strict=True)
    )
    centre = (counts * centres).sum(0) / counts.sum()
    return centre, (counts * (spreads + (centres - centre).square())).sum(0) / counts.sum()


def _feeds_norm(node: fx.Node) -> bool:
    return [user.target for user in node.users] == [aten.batch_norm.default]
