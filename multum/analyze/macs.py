"""Multiply-accumulates of an operator, from the shapes of what goes in and comes out.

Only products that are summed count: convolutions, matrix products, attention, recurrent layers. Adding a bias, norms,
activations, pooling and moving data have none. Attention under a causal mask counts in full: the kernels compute in full.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import fx

from ..graph.layers import QUANTIZERS

Arguments = Mapping[str, Any]  # by the names of the operator's schema

# Operators without a product that is summed, beside element-wise ones and views, which the operators' schemas tell.
_FREE = frozenset((
    "_to_copy", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "all",
    "alpha_dropout", "amax", "amin", "any", "arange", "argmax", "argmin", "argsort", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "batch_norm", "cat", "channel_shuffle", "clone", "column_stack", "concat", "concatenate", "constant_pad_nd", "contiguous", "copy",
    "count_nonzero", "cumprod", "cumsum", "dropout", "embedding", "embedding_bag", "empty", "empty_like", "feature_dropout", "fill",
    "flatten", "flip", "floor_divide", "full", "full_like", "gather", "glu", "group_norm", "hardswish", "hstack", "im2col", "index",
    "index_add", "index_put", "index_select", "instance_norm", "layer_norm", "lift_fresh_copy", "linalg_vector_norm", "log_sigmoid",
    "log_softmax", "logsumexp", "masked_fill", "max", "max_pool1d", "max_pool1d_with_indices", "max_pool2d", "max_pool2d_with_indices",
    "max_pool3d", "mean", "median", "meshgrid", "min", "native_batch_norm", "native_group_norm", "native_layer_norm", "new_empty",
    "new_full", "new_ones", "new_zeros", "norm", "one_hot", "ones", "ones_like", "outer", "pad", "pixel_shuffle", "pixel_unshuffle",
    "prelu", "prod", "rand", "rand_like", "randn", "repeat", "repeat_interleave", "reshape", "rms_norm", "roll", "rsub", "scalar_tensor",
    "scatter", "scatter_add", "select_scatter", "slice_scatter", "softmax", "sort", "stack", "std", "sum", "tile", "to", "topk", "tril",
    "triu", "type_as", "unfold", "upsample_bicubic2d", "upsample_bilinear2d", "upsample_linear1d", "upsample_nearest1d",
    "upsample_nearest2d", "upsample_nearest3d", "upsample_trilinear3d", "var", "vstack", "zeros", "zeros_like",
))  # fmt: skip


def macs(node: fx.Node, arguments: Arguments, result: Any) -> int | None:
    """Multiply-accumulates of one call. None: no formula covers the operator."""
    target: Any = node.target
    if not gives_tensors(node):
        return 0
    name = target._schema.name.split("::")[1]
    if name in _FORMULAS:
        return _FORMULAS[name](arguments, result)
    returned = target._schema.returns
    free = name in _FREE or target in QUANTIZERS or torch.Tag.pointwise in target.tags
    return 0 if free or any(value.alias_info is not None for value in returned) else None


def gives_tensors(node: fx.Node) -> bool:
    """Whether the node is a tensor operator: not arithmetic on sizes, nor a size itself."""
    return isinstance(node.target, torch._ops.OpOverload) and any("Tensor" in str(value.type) for value in node.target._schema.returns)


def _convolution(call: Arguments, result: Any) -> int:
    """[n, c_out, ...] x (c_in / groups) x kernel; the weight is [c_out, c_in / groups, kernel...]."""
    return int(result.numel() * call["weight"][0].numel())


def _transposed(call: Arguments, result: Any) -> int:
    """Every input element meets (c_out / groups) x kernel weights; the weight is [c_in, c_out / groups, kernel...]."""
    return int(call["input"].numel() * call["weight"][0].numel())


def _linear(call: Arguments, result: Any) -> int:
    return int(result.numel() * call["input"].shape[-1])


def _product(first: str) -> Callable[[Arguments, Any], int]:
    """[..., m, k] x [..., k, n]: every element of the result sums k products."""
    return lambda call, result: int(result.numel() * call[first].shape[-1])


def _attention(call: Arguments, result: Any) -> int:
    """Query [..., l, e] x key [..., s, e], then [..., l, s] x value [..., s, v]."""
    query, key, value = call["query"], call["key"], call["value"]
    return int(prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1]))


def _recurrent(call: Arguments, result: Any) -> int | None:
    """Every weight matrix is used once for each sample and time step; the input is [n, time, features], not packed."""
    if "input" not in call:
        return None
    used = sum(weight.numel() for weight in call["params"] if weight.ndim == 2)
    return int(used * call["input"].numel() // call["input"].shape[-1])


def _einsum(call: Arguments, result: Any) -> int | None:
    """The product of the sizes of all letters, for two operands; more are contracted in an order that is not known here."""
    operands = call["tensors"]
    letters = str(call["equation"]).replace(" ", "").split("->")[0].split(",")
    if len(operands) > 2 or any("." in part for part in letters):
        return None
    if len(operands) < 2:
        return 0
    sizes: dict[str, int] = {
        letter: size for part, operand in zip(letters, operands, strict=True) for letter, size in zip(part, operand.shape, strict=True)
    }
    return prod(sizes.values())


_FORMULAS: dict[str, Callable[[Arguments, Any], int | None]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed),
    "linear": _linear,
    **dict.fromkeys(("mm", "bmm", "matmul", "mv", "dot"), _product("self")),
    "addmm": _product("mat1"),
    "baddbmm": _product("batch1"),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    "einsum": _einsum,
}
