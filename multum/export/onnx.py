"""A graph as ONNX, with integer weights and quantize/dequantize pairs, by `torch.onnx`."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import ExportError
from ..graph import Graph
from ..graph.model import aten
from ..graph.spec import Spec
from .attention import attention
from .finish import finish
from .integers import kind, to_integer_weights

OPSET = 21  # the first with 16-bit integers in QuantizeLinear
_LARGEST = 2**31 - 2**24  # bytes: what one protobuf message holds, less room for the operators


def to_onnx_bytes(graph: Graph) -> bytes:
    """The graph in eval mode as an ONNX file's content, fused, its first dimension named "batch"; the graph itself is not changed.

    `metadata_props` hold the structure of inputs and outputs ("multum.io", see `multum.graph.spec`) and the fingerprint.
    Raises ExportError, naming the operator, when ONNX cannot express one, and for models above 2 GB.
    """
    from ..graph.fuse import fuse

    work = graph.copy().to("cpu").eval()
    fuse(work)
    _settle_layouts(work)
    to_integer_weights(work)
    size = sum(tensor.nbytes for _, tensor in work.named_tensors())
    if size > _LARGEST:
        raise ExportError(f"The model has {size / 2**30:.1f} GB of tensors.", "at most 2 GB, the most that an ONNX file holds")
    with _quiet():
        program = _translate(work, _input_names(graph.inputs), _names(graph.outputs, "output"))
    model = program.model_proto
    io = {"inputs": graph.inputs, "outputs": graph.outputs}
    finish(model, {"multum.io": json.dumps(io), "multum.fingerprint": graph.fingerprint()})
    content: bytes = model.SerializeToString()
    return content


def batched(leaves: Sequence[Tensor]) -> list[bool]:
    """Which inputs have the batch as their first dimension: those that share it with the first input."""
    return [bool(leaf.ndim and leaves[0].ndim and leaf.shape[0] == leaves[0].shape[0]) for leaf in leaves]


def _input_names(spec: Spec) -> list[str]:
    """Named inputs keep their name; others are "input", or "input_0", "input_1" ..."""
    positional, named = spec["c"]
    return _unique([*_names(positional, "input"), *_names(named, "input")])


def _names(spec: Spec, default: str) -> list[str]:
    """A readable name for every tensor of a structure: its keys joined, after `default` when they begin with a number."""
    paths = ["_".join(path) for path in _paths(spec)]
    if len(paths) == 1 and re.fullmatch(r"[\d_]*", paths[0]):
        return [default]
    return _unique(re.sub(r"\W", "_", path if path[:1].isalpha() else f"{default}_{path}") for path in paths)


def _unique(names: Iterable[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        found.append(name if name not in found else f"{name}_{len(found)}")
    return found


def _paths(spec: Spec) -> Iterator[tuple[str, ...]]:
    if spec["t"] == "tensor":
        yield ()
    for key, child in zip(spec.get("k", range(len(spec.get("c", ())))), spec.get("c", ()), strict=True):
        yield from ((str(key), *path) for path in _paths(child))


def _settle_layouts(graph: Graph) -> None:
    """Makes views independent of memory layout: the exporter's own form of attention lays its result out otherwise than the kernel does."""
    for view in graph.find(aten.view.default):
        view.target = aten.reshape.default
    for node in graph.find(aten.scaled_dot_product_attention.default):
        users = list(node.users)
        with graph.fx.inserting_after(node):
            copied = graph.fx.call_function(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
        for user in users:
            user.replace_input_with(node, copied)


def _projects(lstm: fx.Node) -> bool:
    """Whether the layer makes its hidden state smaller than its cell."""
    hidden, cell = (state.meta["val"] for state in lstm.args[1])  # type: ignore[union-attr]
    return bool(hidden.shape != cell.shape)


def _translate(graph: Graph, inputs: list[str], outputs: list[str]) -> Any:
    from onnxscript.optimizer import optimize_ir
    from onnxscript.rewriter import onnx_fusions
    from torch._decomp.decompositions import lstm_impl

    leaves = tuple(graph._example_leaves())
    dynamic = tuple({0: torch.export.Dim.AUTO} if free else None for free in batched(leaves))
    try:
        with torch.no_grad():
            exported = torch.export.export(fx.GraphModule(graph.tensors, graph.fx), leaves, dynamic_shapes=dynamic, strict=False)
        if any(map(_projects, graph.find(aten.lstm.input))):  # which ONNX's own LSTM cannot
            exported = exported.run_decompositions({aten.lstm.input: lstm_impl})
        program = torch.onnx.export(
            exported,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            custom_translation_table=_translations(),
            verbose=False,
            optimize=False,
        )
        assert program is not None
        optimize_ir(program.model, should_fold=_may_fold)
        onnx_fusions.fuse(program.model)
        return program
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the exporter wraps what went wrong in advice
            cause = cause.__cause__
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        raise ExportError(
            f"The graph cannot be expressed in ONNX: {type(cause).__name__}: {' '.join(lines[:3])[:400]}",
            "operators that ONNX has",
            "leave out the step that brought the operator in, if one did",
        ) from error


_LONGEST_RANGE = 64  # places that an ONNX file lists rather than has counted by its runtime


def _may_fold(node: Any) -> bool | None:
    """No, where small integers are cast to larger ones or counted up far: indices of shared weights. Elsewhere the optimizer decides."""
    if node.op_type == "Range" and all(value.const_value is not None for value in node.inputs):
        start, limit, _ = (int(value.const_value.numpy()) for value in node.inputs)
        return False if limit - start > _LONGEST_RANGE else None
    if node.op_type == "Neg":  # numbers that are read with both signs are stored with one
        return False
    if node.op_type == "Cast" and (value := node.inputs[0].const_value) is not None:
        before, after = (str(kind).rpartition(".")[2] for kind in (value.dtype, node.outputs[0].dtype))
        if before in ("INT8", "UINT8", "INT16") and after in ("INT32", "INT64"):
            return False
    return None


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    from onnxscript import ir
    from onnxscript import opset21 as op

    types = {t: ir.DataType[str(t).removeprefix("torch.").upper()] for t in (torch.uint8, torch.int8, torch.uint16, torch.int16)}

    def dequantize(integers: Any, scale: Any, zero: Any, axis: int) -> Any:
        return op.DequantizeLinear(integers, scale, zero, axis=axis)

    def fake_quantize(x: Any, scale: Any, zero: Any, low: int, high: int) -> Any:
        levels = op.QuantizeLinear(x, scale, zero)
        integer = kind(low, high)
        assert integer is not None
        bounds = torch.iinfo(integer)
        if (low, high) != (bounds.min, bounds.max):  # fewer bits than the type has
            levels = op.Clip(levels, *(op.Constant(value=ir.tensor(bound, dtype=types[integer])) for bound in (low, high)))
        return op.DequantizeLinear(levels, scale, zero)

    def quantize_in_call(x: Any) -> Any:
        return op.DynamicQuantizeLinear(x)

    def integer_product(q: Any, scale: Any, zero: Any, columns: Any, scales: Any) -> Any:
        sums = op.Cast(op.MatMulInteger(q, columns, zero), to=ir.DataType.FLOAT)
        return op.Mul(sums, op.Mul(scale, scales))

    return {
        torch.ops.multum.quantize_in_call.default: quantize_in_call,
        torch.ops.multum.integer_product.default: integer_product,
        torch.ops.multum.dequantize.default: dequantize,
        torch.ops.multum.fake_quantize.default: fake_quantize,
        aten.scaled_dot_product_attention.default: attention,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """No notes about packages that `torch.onnx` would like to have."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
