"""Fake-quantization operators put into a graph, for weights and for activations."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import StepError
from ..export.dynamic import quantized_in_calls
from ..graph import Graph, Layer
from ..graph.layers import QUANTIZERS, source
from ..graph.model import aten
from .grid import Grid, best_scale, full_scale, signed
from .placement import Placement


def weight_scale(weight: Tensor, grid: Grid) -> Tensor:
    """The symmetric scale per channel [channels]: full range for 8 bits, where rounding is finer than any clipping; else the best."""
    return full_scale(weight, grid) if grid.high >= 127 else best_scale(weight, grid)


def quantize_weight(graph: Graph, layer: Layer, bits: int, scale: float | Tensor | None = None) -> None:
    """Reads the layer's weight through a quantizer wherever the graph reads it, with a scale per output channel that trains.

    A `scale` that is given, a number for all channels or one for each [channels], stays.

    The gradient of the scale is multiplied by 1 / sqrt(weights per scale * largest integer) (Esser et al. 2020, section 2.2).
    """
    weight = graph.tensor(layer.weight)
    grid = signed(bits, layer.scale_axis)
    if isinstance(scale, float):
        scale = weight.new_full([weight.shape[layer.scale_axis]], scale)
    scales = weight_scale(weight, grid) if scale is None else scale
    graph.set_tensor(f"{layer.weight}_scale", scales, parameter=scale is None)
    graph.set_tensor(f"{layer.weight}_zero_point", torch.zeros_like(scales))
    reads = [node for node in graph.fx.nodes if node.op == "get_attr" and node.target == layer.weight]
    first, after = reads[0], reads[0].next
    rest = [graph.attribute(f"{layer.weight}_{name}", after) for name in ("scale", "zero_point")]
    # Two digits of it, for it stands in the file.
    factor = float(f"{1 / math.sqrt(weight.numel() / scales.numel() * grid.high):.1e}")
    args = (first, *rest, layer.scale_axis, grid.low, grid.high, factor)
    quantizer = graph.operator(aten._fake_quantize_learnable_per_channel_affine.default, args, first, after)
    quantizer.meta["module"] = layer.name
    for node in reads:
        node.replace_all_uses_with(quantizer, lambda user: user is not quantizer)


def quantize_values(graph: Graph, placement: Placement, parameters: Mapping[str, Mapping[str, Any]]) -> None:
    """Quantizes the activations of a placement. `parameters` holds bits, scale and zero point by the name of the value that leads."""
    for root in dict.fromkeys(placement.root(value) for value in placement.readers):
        put_scale(graph, root.name, parameters[root.name])
    for value, readers in placement.readers.items():
        name = placement.root(value).name
        quantize_value(graph, value, name, Grid(parameters[name]["low"], parameters[name]["high"]), readers)


def put_scale(graph: Graph, name: str, entry: Mapping[str, Any]) -> None:
    """The scale and the zero point of activations, as buffers."""
    device = next((tensor.device for _, tensor in graph.named_tensors()), None)
    graph.set_tensor(f"activations.{name}.scale", torch.tensor(entry["scale"], dtype=torch.float32, device=device))
    graph.set_tensor(f"activations.{name}.zero_point", torch.tensor(entry.get("zero_point", 0), dtype=torch.int32, device=device))


def quantize_value(graph: Graph, value: fx.Node, name: str, grid: Grid, readers: Container[fx.Node] | None = None) -> None:
    """Puts a quantizer, with the scale of `name`, between a value and those that read it; all when not named."""
    after = following(graph, value)
    rest = [graph.attribute(f"activations.{name}.{part}", after) for part in ("scale", "zero_point")]
    args = (value, *rest, grid.low, grid.high)
    quantizer = graph.operator(aten.fake_quantize_per_tensor_affine.tensor_qparams, args, value, after)
    for user in [user for user in value.users if user is not quantizer and (readers is None or user in readers)]:
        user.replace_input_with(value, quantizer)


def check_activations(graph: Graph) -> None:
    """Raises StepError when there are activations on grids already."""
    if any(source(node) is None for node in graph.find(*QUANTIZERS)) or any(map(quantized_in_calls, graph.find(aten.mul.Tensor))):
        do = "let one step quantize them, once"
        raise StepError("The activations are quantized already.", "activations in float", do)


def following(graph: Graph, value: fx.Node) -> fx.Node:
    """The node before which something that reads a value may stand: after all inputs, when it is one."""
    inputs = [node for node in graph.fx.nodes if node.op == "placeholder"]
    return (inputs[-1] if value in inputs else value).next
