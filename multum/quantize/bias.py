"""What rounding does to biases: it must not shift the mean of a layer's outputs, and what engines round must be known."""

from __future__ import annotations

from collections.abc import Container
from functools import partial

import torch
from torch import Tensor, fx

from ..export.integers import finer
from ..graph import Graph, Layer, layers
from ..graph.file import grid, to_integers
from ..graph.fuse import channel, give_bias
from ..graph.layers import QUANTIZERS
from ..graph.matrix import data
from ..graph.model import aten, shape
from ..graph.watch import Watch
from ..task import Task, calibration

_LINEAR = (aten.linear.default, aten.addmm.default)


def correct_biases(graph: Graph, original: Graph, names: Container[str], task: Task, samples: int) -> dict[str, float]:
    """Shifts the biases of these layers until the mean outputs of the quantized graph are those of `original`, on calibration data
    (Nagel et al. 2019, section 4.2).

    Both graphs have layers of the same names. The shift is averaged over the batches, and every layer sees what the corrected
    ones before it make: one pass does, in the memory of one batch. Returns the largest shift in each layer.
    """
    wanted = {layer.node: layer for layer in correctable(graph) if layer.name in names}
    biases = {node: give_bias(graph, layer) for node, layer in wanted.items()}
    graph.recompile()
    places = {layer.name: layer.node for layer in layers(original)}
    before = {name: graph.tensor(name).detach().clone() for name in biases.values()}
    means: dict[fx.Node, Tensor] = {}

    def note(node: fx.Node, value: Tensor) -> None:
        means[node] = _mean(value, channel(node))

    def shift(count: int, node: fx.Node, value: Tensor) -> Tensor:
        missing = (means[places[wanted[node].name]] - _mean(value, channel(node))) / count
        graph.tensor(biases[node]).data.add_(missing)
        return value + missing.reshape([-1 if dim == channel(node) % value.ndim else 1 for dim in range(value.ndim)])

    with torch.inference_mode():
        for count, inputs in enumerate(calibration(task, samples), 1):
            Watch(original, [places[layer.name] for layer in wanted.values()], note)(inputs)
            Watch(graph, biases, partial(shift, count))(inputs)
    return {layer.name: float((graph.tensor(biases[node]).detach() - before[biases[node]]).abs().max()) for node, layer in wanted.items()}


@torch.no_grad()
def settle_biases(graph: Graph) -> None:
    """Rounds, in place, the biases of layers that read activations of few bits to what integer kernels hold: multiples of both scales.

    Engines would do it. So few bits make of a small shift another integer here and there, and the file would not be the graph's equal.
    """
    for layer in correctable(graph):
        weight, inputs = layer.node.args[layer.position], data(layer)
        if layer.bias is None or not isinstance(weight, fx.Node) or {weight.target, inputs.target} - {*QUANTIZERS}:
            continue
        bias, value = graph.tensor(layer.bias), graph.tensor(layer.weight)
        if (times := finer(weight, to_integers(value.detach(), graph, weight))) > 1:
            scale = (grid(graph, weight, value.ndim)[0].flatten() * grid(graph, inputs, 0)[0].flatten() / times).to(bias)
            bias.copy_((bias / scale).round() * scale)


def correctable(graph: Graph) -> list[Layer]:
    """Convolutions, and linear layers with one row for each sample, that share their bias with no other layer.

    The mean over tokens says little: padding counts in it, and inputs from a layer normalization have a mean near zero.
    """
    known = layers(graph)
    takes = [layer for layer in known if layer.kind == "conv" or (layer.node.target in _LINEAR and len(shape(layer.node)) == 2)]
    return [layer for layer in takes if layer.bias is None or sum(other.bias == layer.bias for other in known) == 1]


def _mean(value: Tensor, channel: int) -> Tensor:
    return value.mean([dim for dim in range(value.ndim) if dim != channel % value.ndim])
