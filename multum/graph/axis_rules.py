"""For each ATen operator that computes: which axes of its inputs and outputs are one, and which must stay whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from .axis import Axis, fix, product, total, unify
from .axis_trace import Axes, Kept, Trace, broadcast, fix_all, fixed, name_of, rule, shape, unknown
from .axis_zeros import keeps_zeros
from .layers import source
from .model import aten, read

# --- element by element ------------------------------------------------------------------------------------------------

# Operators that change no axis of their first input, of those that PyTorch does not mark as pointwise.
_UNCHANGED = [
    "to", "contiguous", "detach", "alias", "lift", "lift_fresh", "type_as", "_to_copy", "dropout", "alpha_dropout", "feature_dropout",
    "feature_alpha_dropout", "native_dropout", "hardswish", "log_sigmoid", "zeros_like", "ones_like", "full_like", "empty_like",
    "rand_like", "randn_like", "bernoulli", "fill", "fake_quantize_per_tensor_affine", "_fake_quantize_learnable_per_tensor_affine",
    "data", "special_expit", "detach_copy", "real", "imag", "absolute", "negative", "arctan", "clone", "positive",
]  # fmt: skip
_POINTWISE = [
    "where", "masked_fill", "rsub", "floor_divide", "true_divide", "multiply", "subtract", "divide", "__and__", "__or__", "__xor__",
    "polar", "complex",
]  # fmt: skip


def _packets(names: Iterable[str]) -> Iterator[Any]:
    return (getattr(aten, name) for name in names if hasattr(aten, name))


@rule(*_packets(_UNCHANGED))
def unchanged(trace: Trace, node: fx.Node) -> Any:
    return trace.axes(node.args[0])


@rule(*_packets(_POINTWISE))
def pointwise(trace: Trace, node: fx.Node) -> Any:
    return broadcast([trace.axes(operand) for operand in node.all_input_nodes])


@rule(aten.prelu)
def _prelu(trace: Trace, node: fx.Node) -> Any:
    axes = trace.argument(node, "self")
    for slope in trace.argument(node, "weight"):
        if slope.size > 1:
            unify(axes[1], slope)
    return axes


@rule(aten.fake_quantize_per_channel_affine, aten._fake_quantize_learnable_per_channel_affine)
def _quantize_channels(trace: Trace, node: fx.Node) -> Any:
    axes = trace.argument(node, "self")
    for name in ("scale", "zero_point"):
        unify(axes[read(node, "axis")], trace.argument(node, name)[0])
    return axes


# --- sums of products --------------------------------------------------------------------------------------------------


@rule(aten.linear)
def _linear(trace: Trace, node: fx.Node) -> Any:
    x, weight = trace.argument(node, "input"), trace.argument(node, "weight")
    unify(x[-1], weight[-1])
    for bias in trace.argument(node, "bias"):
        unify(bias, weight[0])
    return (*x[:-1], *weight[:-1])


def _multiply(a: Axes, b: Axes) -> Axes:
    """The axes of a matrix product with broadcast leading axes; the contracted axis is one, and may be cut."""
    unify(a[-1], b[-2] if len(b) > 1 else b[0])
    rows, columns = a[-2:-1], b[-1:] if len(b) > 1 else ()
    return (*broadcast([a[:-2], b[:-2]]), *rows, *columns)


@rule(aten.matmul, aten.mm, aten.bmm, aten.mv, aten.dot)
def _matmul(trace: Trace, node: fx.Node) -> Any:
    a, b = trace.axes(node.args[0]), trace.axes(node.args[1])
    if all(source(operand) is None for operand in node.args):  # no weight: queries and keys, or what they attend to
        trace.note("heads", (*a[:-2], *b[:-2]))
        trace.note("width", (a[-1], b[-1]))
    return _multiply(a, b)


@rule(aten.addmm, aten.baddbmm, aten.addmv)
def _addmm(trace: Trace, node: fx.Node) -> Any:
    return broadcast([_multiply(trace.axes(node.args[1]), trace.axes(node.args[2])), trace.axes(node.args[0])])


@rule(aten.einsum)
def _einsum(trace: Trace, node: fx.Node) -> Any:
    equation = read(node, "equation").replace(" ", "")
    operands = [trace.axes(operand) for operand in read(node, "tensors")]
    inputs, arrow, output = equation.partition("->")
    if not arrow or "..." in equation:
        return unknown(trace, node)
    if len(operands) == 2 and all(source(operand) is None for operand in read(node, "tensors")):
        for term, axes in zip(inputs.split(","), operands, strict=True):
            shared = [letter in inputs.replace(term, "", 1) for letter in term]
            trace.note("heads", (axis for axis, letter, both in zip(axes, term, shared, strict=True) if both and letter in output))
            trace.note("width", (axis for axis, letter, both in zip(axes, term, shared, strict=True) if both and letter not in output))
    letters: dict[str, Axis] = {}
    for term, axes in zip(inputs.split(","), operands, strict=True):
        for letter, axis in zip(term, axes, strict=True):
            if letters.setdefault(letter, axis).size == 1:
                letters[letter] = axis
            elif axis.size > 1:
                unify(letters[letter], axis)
    return tuple(letters[letter] for letter in output)


@rule(aten.conv1d, aten.conv2d, aten.conv3d)
def _conv(trace: Trace, node: fx.Node) -> Any:
    weight = trace.argument(node, "weight")
    group = Axis(read(node, "groups"))
    unify(_channels(trace, node, len(weight)), product([group, weight[1]]))
    unify(weight[0], product([group, Axis(weight[0].size // group.size)]))
    return _convolved(trace, node, weight, weight[0], group)


@rule(aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)
def _conv_transpose(trace: Trace, node: fx.Node) -> Any:
    weight = trace.argument(node, "weight")
    group = Axis(read(node, "groups"))
    unify(_channels(trace, node, len(weight)), weight[0])
    unify(weight[0], product([group, Axis(weight[0].size // group.size)]))
    return _convolved(trace, node, weight, product([group, weight[1]]), group)


def _channels(trace: Trace, node: fx.Node, weight_dims: int) -> Axis:
    return trace.argument(node, "input")[1 - weight_dims]


def _convolved(trace: Trace, node: fx.Node, weight: Axes, outputs: Axis, group: Axis) -> Axes:
    x, spatial = trace.argument(node, "input"), len(weight) - 2
    fix_all(weight[2:], "it is the window of a convolution")
    fix_all(x[len(x) - spatial :], f"{name_of(node)} slides over it")
    for bias in trace.argument(node, "bias"):
        unify(bias, outputs)
    if group.size > 1:
        trace.literal(node, "groups", lambda kept: kept(group))
    return (*x[: -spatial - 1], outputs, *fixed(shape(node)[-spatial:], f"{name_of(node)} slides over it"))


@rule(aten.embedding)
def _embedding(trace: Trace, node: fx.Node) -> Any:
    table = trace.argument(node, "weight")
    fix(table[0], "it is indexed by data")
    return (*trace.argument(node, "indices"), table[1])


# --- normalization -----------------------------------------------------------------------------------------------------


@rule(aten.batch_norm, aten.instance_norm)
def _channel_norm(trace: Trace, node: fx.Node) -> Any:
    x = trace.argument(node, "input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        for axis in trace.argument(node, name):
            unify(x[1], axis)
    fix_all((*x[:1], *x[2:]), f"{name_of(node)} normalizes over it")
    return x


@rule(aten.group_norm)
def _group_norm(trace: Trace, node: fx.Node) -> Any:
    x, groups = trace.argument(node, "input"), Axis(read(node, "num_groups"))
    inside = Axis(x[1].size // groups.size, "group_norm normalizes over it")
    unify(x[1], product([groups, inside]))
    for name in ("weight", "bias"):
        for axis in trace.argument(node, name):
            unify(x[1], axis)
    fix_all(x[2:], "group_norm normalizes over it")
    trace.literal(node, "num_groups", lambda kept: kept(groups))
    return x


@rule(aten.layer_norm)
def _layer_norm(trace: Trace, node: fx.Node) -> Any:
    x = trace.argument(node, "input")
    normalized = x[len(x) - len(read(node, "normalized_shape")) :]
    fix_all(normalized, "layer_norm normalizes over it")
    for name in ("weight", "bias"):
        for axis, own in zip(normalized, trace.argument(node, name), strict=False):
            unify(axis, own)
    return x


@rule(aten.rms_norm)
def _rms_norm(trace: Trace, node: fx.Node) -> Any:
    """Of n channels with m of them left: x / sqrt(sum / n + eps) = sqrt(n / m) * x / sqrt(sum / m + eps * n / m)."""
    x = trace.argument(node, "input")
    normalized = x[len(x) - len(read(node, "normalized_shape")) :]
    for axis, own in zip(normalized, trace.argument(node, "weight"), strict=False):
        unify(axis, own)
    eps = read(node, "eps")
    eps = torch.finfo(node.meta["val"].dtype).eps if eps is None else eps
    trace.literal(node, "normalized_shape", lambda kept: [kept(axis) for axis in normalized])
    trace.literal(node, "eps", lambda kept: eps / _share(normalized, kept))
    trace.scaled(node, lambda kept: _share(normalized, kept) ** -0.5)
    return x


def _share(axes: Iterable[Axis], kept: Kept) -> float:
    """How much is left of the axes together."""
    return math.prod(kept(axis) / axis.size for axis in axes)


@rule(aten._weight_norm)
def _weight_norm(trace: Trace, node: fx.Node) -> Any:
    v, g, dim = trace.argument(node, "v"), trace.argument(node, "g"), read(node, "dim")
    fix_all((axis for place, axis in enumerate(v) if place != dim), "weight_norm normalizes over it")
    if dim != -1:
        unify(v[dim], g[dim])
    return v


@rule(aten.softmax, aten.log_softmax, aten._softmax, aten._log_softmax, aten.cumsum, aten.cumprod, aten.logcumsumexp)
def along(trace: Trace, node: fx.Node) -> Any:
    """Mixes the values along one axis and keeps the shape."""
    x = trace.axes(node.args[0])
    if x:
        fix(x[read(node, "dim")], f"{name_of(node)} runs along it")
    return x


_FOURIER = [f"fft_{kind}fft{count}" for kind in ("", "i", "r", "ir", "h", "ih") for count in ("", "2", "n")]


@rule(aten.roll, aten.flip, *_packets(_FOURIER), *_packets(["fft_fftshift", "fft_ifftshift"]))
def _along_several(trace: Trace, node: fx.Node) -> Any:
    x, reason = trace.axes(node.args[0]), f"{name_of(node)} runs along it"
    dims = read(node, "dims") or read(node, "dim")
    chosen = {dim % len(x) for dim in (range(len(x)) if dims is None else [dims] if isinstance(dims, int) else dims)}
    fix_all((x[dim] for dim in chosen), reason)
    return tuple(Axis(size, reason) if place in chosen else x[place] for place, size in enumerate(shape(node)))


@rule(aten.sort, aten.topk, aten.cummax, aten.cummin)
def _along_two_results(trace: Trace, node: fx.Node) -> Any:
    x = trace.axes(node.args[0])
    dim = read(node, "dim", -1) % len(x)
    fix(x[dim], f"{name_of(node)} runs along it")
    result = tuple(Axis(size, axis.reason) if place == dim else axis for place, (size, axis) in enumerate(_sizes(node, x)))
    return result, result


def _sizes(node: fx.Node, x: Axes) -> Iterator[tuple[int, Axis]]:
    return zip(node.meta["val"][0].shape, x, strict=True)


# --- reductions --------------------------------------------------------------------------------------------------------

# A sum is the same without the terms that are zero; anything else changes when an axis gets shorter.
_SUMS = (aten.sum, aten.linalg_vector_norm)


@rule(*_SUMS, aten.mean, aten.amax, aten.amin, aten.max, aten.min, aten.argmax, aten.argmin, aten.var, aten.std, aten.prod, aten.logsumexp)
@rule(aten.any, aten.all, aten.norm, aten.var_mean, aten.median)
def _reduce(trace: Trace, node: fx.Node) -> Any:
    if "other" in node.target.__name__:  # type: ignore[union-attr]  # the larger of two tensors
        return pointwise(trace, node)
    x, dims = trace.axes(node.args[0]), read(node, "dim")
    chosen = range(len(x)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    reduced = {dim % len(x) for dim in chosen} if x else set()
    plain_sum = node.target.overloadpacket in _SUMS and read(node, "ord", 2) in (1, 2)  # type: ignore[union-attr]
    if node.target.overloadpacket is aten.mean and keeps_zeros(trace, node.args[0], [x[dim] for dim in reduced]):  # type: ignore[union-attr]
        trace.scaled(node, lambda kept: _share((x[dim] for dim in reduced), kept))  # what is left, over as many as there were
    elif not plain_sum:
        fix_all((x[dim] for dim in reduced), f"{name_of(node)} reduces it")
    keep = bool(read(node, "keepdim", False))
    result = tuple(Axis(1) if dim in reduced else axis for dim, axis in enumerate(x) if keep or dim not in reduced)
    return tuple(result for _ in node.meta["val"]) if isinstance(node.meta["val"], tuple) else result


_SPATIAL = [
    "avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool", "max_pool#_with_indices", "upsample_nearest",
    "upsample_nearest_exact", "upsample_linear", "upsample_bilinear", "upsample_bicubic", "upsample_trilinear", "_upsample_nearest_exact",
    "_upsample_bilinear#_aa", "_upsample_bicubic#_aa", "reflection_pad", "replication_pad",
]  # fmt: skip


def _spatial_operators() -> Iterator[tuple[Any, int]]:
    for name in _SPATIAL:
        for count in (1, 2, 3):
            packet = getattr(aten, name.replace("#", f"{count}d") if "#" in name else f"{name}{count}d", None)
            if packet is not None:
                yield packet, count


_SPATIAL_DIMS = dict(_spatial_operators())


@rule(*_SPATIAL_DIMS, aten.grid_sampler, aten.grid_sampler_2d)
def _spatial(trace: Trace, node: fx.Node) -> Any:
    """Works on the last dimensions, for each channel alone."""
    x = trace.axes(node.args[0])
    count = _SPATIAL_DIMS.get(node.target.overloadpacket, len(x) - 2)  # type: ignore[union-attr]
    reason = f"{name_of(node)} slides over it"
    fix_all(x[len(x) - count :], reason)
    value, leading = node.meta["val"], x[: len(x) - count]
    if isinstance(value, tuple):
        return tuple((*leading, *fixed(part.shape[-count:], reason)) for part in value)
    return (*leading, *fixed(value.shape[-count:], reason))


# --- attention and recurrent networks ----------------------------------------------------------------------------------


@rule(aten.scaled_dot_product_attention)
def _attention(trace: Trace, node: fx.Node) -> Any:
    """q [..., L, E], k [..., S, E], v [..., S, V], mask [..., L, S] -> [..., L, V]."""
    q, k, v = (trace.argument(node, name) for name in ("query", "key", "value"))
    if read(node, "enable_gqa"):
        queries = Axis(q[-3].size // k[-3].size)
        trace.note("queries", [queries])
        shared = product([k[-3], queries])
        unify(q[-3], shared)
        unify(k[-3], v[-3])
        k, v = ((*axes[:-3], shared, *axes[-2:]) for axes in (k, v))
    unify(q[-1], k[-1])
    unify(k[-2], v[-2])
    fix(k[-2], "softmax runs along it")
    if read(node, "is_causal"):
        fix(q[-2], "the causal mask runs along it")
    scores = (*broadcast([q[:-2], k[:-2], v[:-2]]), q[-2], k[-2])
    trace.note("heads", scores[:-2])
    trace.note("width", (q[-1], v[-1]))
    broadcast([scores, trace.argument(node, "attn_mask")])
    if read(node, "scale") is None:  # it follows from the size of q; the original's stays
        trace.literal(node, "scale", lambda kept: None if kept(q[-1]) == q[-1].size else 1 / math.sqrt(q[-1].size))
    return (*scores[:-1], v[-1])


@rule(aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
def _recurrent(trace: Trace, node: fx.Node) -> Any:
    """All layers and directions share one state tensor, and so one hidden axis."""
    x, weights = trace.argument(node, "input"), [trace.axes(weight) for weight in read(node, "params")]
    hx = read(node, "hx")
    states = [trace.axes(state) for state in ([hx] if isinstance(hx, fx.Node) else hx)]
    hidden, outputs = states[-1][2], states[0][2]  # the cell of an LSTM; what it gives on, which a projection may make smaller
    directions = 2 if read(node, "bidirectional") else 1
    count = len(weights) // (read(node, "num_layers") * directions)
    if not any(len(weight) == 2 for start in range(0, len(weights), count) for weight in weights[start + 2 : start + count]):
        unify(hidden, outputs)
    trace.note("units", (hidden, outputs))
    given = x[2]
    for start in range(0, len(weights), count):
        w_ih, w_hh, *others = weights[start : start + count]
        if start and start % (count * directions) == 0:
            given = total([outputs] * directions)
        gates = w_ih[0].size // hidden.size
        for axis in (w_ih[0], w_hh[0], *(bias[0] for bias in others if len(bias) == 1)):
            unify(axis, product([Axis(gates, "it holds the gates"), hidden]))
        unify(w_ih[1], given)
        unify(w_hh[1], outputs)
        for projection in (weight for weight in others if len(weight) == 2):
            unify(projection[0], outputs)
            unify(projection[1], hidden)
    for state in states:
        fix(state[0], "it counts layers")
        unify(state[1], x[0 if read(node, "batch_first") else 1])
    return ((*x[:2], total([outputs] * directions)), *states)
