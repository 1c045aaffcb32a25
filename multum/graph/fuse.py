"""Exact fusions: the same function with fewer operators, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .file import from_integers, to_integers
from .layers import KINDS, Layer, layers, source
from .model import Graph, aten, owners, read, shape

_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.feature_alpha_dropout.default)
_SAME = (aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default)
_CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten._to_copy.default)
_PADS = (aten.pad.default, aten.constant_pad_nd.default)
_SMALLEST_SCALE = 1e-12  # of a channel that batch normalization switched off
_LARGEST_CONSTANT = 1 << 16  # elements; a larger constant costs more in the file than it saves in time


def fuse(graph: Graph) -> list[str]:
    """Drops operators that compute nothing in eval mode, and puts paddings and normalizations into the weights of their layers.

    The graph computes the same as before in eval mode, up to rounding. Returns one line for each change. A batch norm is folded
    only when it has running statistics and nothing else reads the result of the layer before it.
    """
    done = _drop_identities(graph) + _fold_constants(graph)
    graph.clean()
    done += _fold_pads(graph)
    for layer in layers(graph):
        norm = _norm_after(graph, layer)
        if norm is not None:
            done.append(f"{owners([norm])} folded into {layer.name}")
            _fold_norm(graph, layer, norm)
    if done:
        graph.clean()
    return done


def zero_pad(node: fx.Node) -> list[int] | None:
    """How many zeros a padding operator adds, last dimension first, in pairs; None for any other operator."""
    if node.target not in _PADS or read(node, "mode", "constant") != "constant" or read(node, "value", 0) not in (None, 0):
        return None
    sizes: Any = node.args[1]
    return list(sizes) if all(isinstance(size, int) and size >= 0 for size in sizes) else None


def _drop_identities(graph: Graph) -> list[str]:
    done = []
    for view in graph.find(aten.view.default):  # without the copies it may meet a memory layout that it cannot view
        view.target = aten.reshape.default
    for node in [n for n in graph.fx.nodes if n.op == "call_function" and n.name not in graph.pinned]:
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or before.op == "get_attr":
            continue
        casts_nothing = node.target in _CASTS and node.meta["val"].dtype == before.meta["val"].dtype
        if node.target in _DROPOUTS or node.target in _SAME or casts_nothing:
            node.replace_all_uses_with(before)
            graph.fx.erase_node(node)
            done.append(f"{node.name} removed from {owners([node])}")
    return done


def _fold_constants(graph: Graph) -> list[str]:
    """Replaces what is computed from buffers and literals alone by its value. Parameters are left: they train."""
    buffers = {name for name, _ in graph.tensors.named_buffers()}
    constant: dict[fx.Node, Any] = {}
    done = []
    for node in list(graph.fx.nodes):
        if node.op == "get_attr" and node.target in buffers:
            constant[node] = graph.tensor(str(node.target))
        elif node.op == "call_function" and all(part in constant for part in node.all_input_nodes) and _is_foldable(node):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda part: constant[part])
            constant[node] = node.target(*args, **kwargs)
    for node in constant:
        if node.op == "get_attr" or all(user in constant or _is_computed_index(node, user) for user in node.users):
            continue
        name = f"constants.of_{node.name}"  # a module has attributes of its own, such as `to`
        graph.set_tensor(name, constant[node].clone())
        node.replace_all_uses_with(graph.attribute(name, node), lambda user: user not in constant)
        done.append(f"{node.name} in {owners([node])} is a constant")
    return done


def _is_computed_index(node: fx.Node, user: fx.Node) -> bool:
    """Whether `user` reads a tensor that trains at places that a rule says: they are not stored on purpose."""
    return user.target is aten.index_select.default and user.args[0] is not node


def _is_foldable(node: fx.Node) -> bool:
    value = node.meta.get("val")
    pure = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded not in node.target.tags
    return pure and isinstance(value, Tensor) and value.numel() <= _LARGEST_CONSTANT and not _widens(node)


def _widens(node: fx.Node) -> bool:
    """Whether small integers are cast to larger ones: they are stored small on purpose."""
    if node.target not in _CASTS or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta["val"].dtype, node.meta["val"].dtype
    whole = not (before is torch.bool or before.is_floating_point or after.is_floating_point)
    return whole and bool(after.itemsize > before.itemsize)


def _fold_pads(graph: Graph) -> list[str]:
    """Zeros added evenly on both sides become the padding of the convolution behind them."""
    done = []
    for node in graph.find(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default):
        pad = node.args[0]
        assert isinstance(pad, fx.Node)
        sizes = zero_pad(pad) or []
        dimensions = len(shape(node)) - 2
        before, after = (sizes[i::2] + [0] * (dimensions - len(sizes) // 2) for i in (0, 1))
        if not sizes or before != after or len(before) != dimensions:
            continue
        own = list(read(node, "padding"))
        total = [ours + theirs for ours, theirs in zip(own * (dimensions // len(own)), reversed(before), strict=True)]
        _set_arguments(node, {"padding": total})
        node.replace_input_with(pad, pad.args[0])  # type: ignore[arg-type]
        done.append(f"{pad.name} folded into {owners([node])}")
    return done


def _set_arguments(node: fx.Node, values: dict[str, Any]) -> None:
    """Sets arguments of a call by name; every argument that has a position is then given by position."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    full = {argument.name: values.get(argument.name, read(node, argument.name)) for argument in schema}
    last = max(i for i, argument in enumerate(schema) if argument.name in values or argument.name in node.kwargs or i < len(node.args))
    node.args, node.kwargs = tuple(list(full.values())[: last + 1]), {}


def _norm_after(graph: Graph, layer: Layer) -> fx.Node | None:
    """The batch norm that may be folded into the layer."""
    node = layer.node
    norm = next(iter(node.users), None)
    weight = node.args[layer.position] if layer.position < len(node.args) else None
    is_plain = layer.kind == "conv" or (node.target is aten.linear.default and len(shape(node)) == 2)
    is_read = isinstance(weight, fx.Node) and (weight.op == "get_attr" or weight is _grid_by_channel(graph, layer))
    if not (is_plain and is_read and norm is not None and len(node.users) == 1):
        return None
    if norm.target is not aten.batch_norm.default or norm.args[0] is not node or norm.name in graph.pinned:
        return None
    uses = _uses(graph, layer.weight, layer.bias)
    alone = uses == (1 if layer.bias is None else 2)
    return norm if alone and norm.args[3] is not None and norm.args[4] is not None else None


def _fold_norm(graph: Graph, layer: Layer, norm: fx.Node) -> None:
    """gamma (W x + b - mean) / sqrt(var + eps) + beta as one layer; computed in double precision."""
    gamma, beta, mean, variance = (
        graph.tensor(str(name)).detach().double() if name else None for name in (n and source(n) for n in norm.args[1:5])
    )
    weight = graph.tensor(layer.weight).detach()
    assert mean is not None
    assert variance is not None
    factor = torch.rsqrt(variance + read(norm, "eps"))
    factor = factor if gamma is None else factor * gamma
    name = give_bias(graph, layer)
    bias = (graph.tensor(name).detach().double() - mean) * factor + (0 if beta is None else beta)
    if (quantizer := _grid_by_channel(graph, layer)) is None:
        graph.set_tensor(layer.weight, scaled(weight.double(), factor, layer).to(weight.dtype))
    else:
        _scale_grid(graph, layer, quantizer, factor)
    graph.set_tensor(name, bias.to(weight.dtype))
    norm.replace_all_uses_with(layer.node)
    graph.fx.erase_node(norm)


def _grid_by_channel(graph: Graph, layer: Layer) -> fx.Node | None:
    """The quantizer of the layer's weight, when each output has its own scale on a grid that is the same for both signs."""
    node = layer.quantizer()
    if node is None or read(node, "axis") != layer.axis or read(node, "quant_min") != -int(read(node, "quant_max")):
        return None
    scale, zero = (graph.tensor(str(source(read(node, name)))) for name in ("scale", "zero_point"))
    return node if scale.numel() == shape(layer.node)[1] and not zero.any() else None


def _scale_grid(graph: Graph, layer: Layer, quantizer: fx.Node, factor: Tensor) -> None:
    """Multiplies a quantized weight by a factor per output [outputs]: the integers stay or change sign, the scales take it up."""
    name = str(source(read(quantizer, "scale")))
    weight, scale = graph.tensor(layer.weight).detach(), graph.tensor(name).detach()
    integers = to_integers(weight, graph, quantizer)
    form = [-1 if dim == layer.axis else 1 for dim in range(weight.ndim)]
    integers = integers * factor.sign().to(integers).reshape(form)
    graph.set_tensor(name, (scale.double() * factor.abs()).clamp_min(_SMALLEST_SCALE).to(scale.dtype))
    graph.set_tensor(layer.weight, from_integers(integers, graph, quantizer))


def give_bias(graph: Graph, layer: Layer) -> str:
    """The name of the layer's own bias; a conv or linear layer that has none gets zeros, one that shares it a copy."""
    if layer.bias is not None and _uses(graph, layer.bias) == 1:
        return layer.bias
    name = _free_name(graph, f"{layer.weight.rpartition('.')[0]}.bias".removeprefix("."))
    weight = graph.tensor(layer.weight)
    zeros = torch.zeros(shape(layer.node)[channel(layer.node)], dtype=weight.dtype, device=weight.device)
    graph.set_tensor(name, graph.tensor(layer.bias).detach().clone() if layer.bias else zeros, parameter=True)
    _set_arguments(layer.node, {"bias": graph.attribute(name, layer.node)})
    return name


def _uses(graph: Graph, *names: str | None) -> int:
    return sum(len(node.users) for node in graph.fx.nodes if node.op == "get_attr" and node.target in names)


def channel(node: fx.Node) -> int:
    """The dimension of a conv or linear operator's result that counts its outputs."""
    return -1 if node.target in KINDS["linear"] else 1


def _free_name(graph: Graph, name: str) -> str:
    taken = {known for known, _ in graph.named_tensors()}
    return name if name not in taken else _free_name(graph, f"{name}_folded")


def scaled(weight: Tensor, factor: Tensor, layer: Layer) -> Tensor:
    """The weight with output channel i multiplied by `factor[i]` [outputs], groups of transposed convolutions included."""
    groups = factor.numel() // weight.shape[layer.axis]
    split = weight.reshape(groups, -1, *weight.shape[1:]) if layer.axis else weight[None]
    form = [groups if layer.axis else 1, *[1] * weight.ndim]
    form[layer.axis + 1] = -1
    return (split * factor.reshape(form)).reshape(weight.shape)
