"""Attention in the few operators that engines know as one: ONNX Runtime and OpenVINO then run it without copies of what is between."""

from __future__ import annotations

import math
from typing import Any

_LOWEST = -3.4028234663852886e38  # of single precision: what is masked, added to a score; minus infinity would leave NaN behind
_MASKED = -1e38  # below: no key is left


def attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """`aten.scaled_dot_product_attention` of query [n, heads, length, width], key and value [n, heads, keys, width], in ONNX operators.

    A query to which no key is left gets zeros, as in PyTorch. A mask, broadcast to [n, heads, length, keys], is true, or added to scores.
    """
    from onnxscript import ir
    from onnxscript import opset21 as op
    from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention as plain

    single = query.dtype == ir.DataType.FLOAT and len(query.shape) == 4
    if not single or is_causal or (enable_gqa and query.shape[1] != key.shape[1]):
        return plain(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)

    def number(of: float) -> Any:
        return op.Constant(value=ir.tensor(of, dtype=ir.DataType.FLOAT))

    scores = op.Mul(
        op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2])), number(1 / math.sqrt(query.shape[3]) if scale is None else scale)
    )
    if attn_mask is None:
        return op.MatMul(op.Softmax(scores, axis=-1), value)
    if attn_mask.dtype == ir.DataType.BOOL:
        attn_mask = op.Where(attn_mask, number(0.0), number(_LOWEST))
    found = op.MatMul(op.Softmax(op.Add(scores, attn_mask), axis=-1), value)
    left = op.ReduceMax(attn_mask, op.Constant(value_ints=[-1]), keepdims=1)
    return op.Where(op.Less(left, number(_MASKED)), number(0.0), found)
