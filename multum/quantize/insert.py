"""Fake-quantization operators put into a graph, for weights and for activations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import Graph, Layer
from ..graph.model import _meta, aten
from .grid import Grid, best_scale, full_scale, signed, unsigned
from .placement import Placement


def weight_scale(weight: Tensor, grid: Grid) -> Tensor:
    """The symmetric scale per channel [channels]: full range for 8 bits, where rounding is finer than any clipping; else the best."""
    return full_scale(weight, grid) if grid.high >= 127 else best_scale(weight, grid)


def quantize_weight(graph: Graph, layer: Layer, bits: int, scale: float | None = None) -> None:
    """Reads the layer's weight through a quantizer wherever the graph reads it, with a scale per output channel that trains.

    A `scale` that is given is that of all channels, and stays.

    The gradient of the scale is multiplied by 1 / sqrt(weights per scale * largest integer) (Esser et al. 2020, section 2.2).
    """
    weight = graph.tensor(layer.weight)
    grid = signed(bits, layer.scale_axis)
    scales = weight_scale(weight, grid) if scale is None else weight.new_full([weight.shape[layer.scale_axis]], scale)
    graph.set_tensor(f"{layer.weight}_scale", scales, parameter=scale is None)
    graph.set_tensor(f"{layer.weight}_zero_point", torch.zeros_like(scales))
    reads = [node for node in graph.fx.nodes if node.op == "get_attr" and node.target == layer.weight]
    first, after = reads[0], reads[0].next
    rest = [graph.attribute(f"{layer.weight}_{name}", after) for name in ("scale", "zero_point")]
    # Two digits of it, for it stands in the file.
    factor = float(f"{1 / math.sqrt(weight.numel() / scales.numel() * grid.high):.1e}")
    args = (first, *rest, layer.scale_axis, grid.low, grid.high, factor)
    quantizer = _call_after(graph, rest[-1], aten._fake_quantize_learnable_per_channel_affine.default, args, first, layer.name)
    for node in reads:
        node.replace_all_uses_with(quantizer, lambda user: user is not quantizer)


def quantize_values(graph: Graph, placement: Placement, parameters: Mapping[str, Mapping[str, Any]]) -> None:
    """Quantizes the activations of a placement. `parameters` holds bits, scale and zero point by the name of the value that leads."""
    for root in dict.fromkeys(placement.root(value) for value in placement.readers):
        entry = parameters[root.name]
        graph.set_tensor(f"activations.{root.name}.scale", torch.tensor(entry["scale"], dtype=torch.float32))
        graph.set_tensor(f"activations.{root.name}.zero_point", torch.tensor(entry["zero_point"], dtype=torch.int32))
    inputs = [node for node in graph.fx.nodes if node.op == "placeholder"]
    for value, readers in placement.readers.items():
        name = placement.root(value).name
        grid = unsigned(parameters[name]["bits"])
        after = (inputs[-1] if value in inputs else value).next
        rest = [graph.attribute(f"activations.{name}.{part}", after) for part in ("scale", "zero_point")]
        args = (value, *rest, grid.low, grid.high)
        target = aten.fake_quantize_per_tensor_affine.tensor_qparams
        quantizer = _call_after(graph, rest[-1], target, args, value, value.meta.get("module", ""))
        for user in [user for user in value.users if user is not quantizer and (readers is None or user in readers)]:
            user.replace_input_with(value, quantizer)


def _call_after(graph: Graph, place: fx.Node, target: Any, args: Sequence[Any], like: fx.Node, module: str) -> fx.Node:
    with graph.fx.inserting_after(place):
        made = graph.fx.call_function(target, tuple(args))
    made.meta = {"val": _meta(like.meta["val"]), "module": module}
    return made
