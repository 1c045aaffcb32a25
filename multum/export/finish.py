"""The last work on a translated file: weights as engines run them fastest, and nothing left that a runtime does not need."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from .integers import four_bits

_MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Identity", "MaxPool"}  # integers pass through them


def finish(model: Any, metadata: dict[str, str]) -> None:
    """Edits an `onnx.ModelProto` in place."""
    graph = model.graph
    _unfold(graph)
    del graph.value_info[:], graph.metadata_props[:], model.metadata_props[:]
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    symbols = [port.type.tensor_type.shape.dim[0].dim_param for port in graph.input if port.type.tensor_type.shape.dim]
    for symbol in filter(None, symbols):
        for port in (*graph.input, *graph.output):
            for dim in port.type.tensor_type.shape.dim:
                if dim.dim_param:
                    dim.dim_param = re.sub(rf"\b{symbol}\b", "batch", dim.dim_param)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)


def _unfold(graph: Any) -> None:
    """Writes integer weights that meet floating-point inputs as Cast and Mul, which engines compute once, when they load.

    A DequantizeLinear is kept for integer kernels instead, and without one would be computed anew in every call.
    """
    from onnx import numpy_helper

    constants = {one.name: one for one in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)

    def meets_integers(name: str) -> bool:
        return any(
            meets_integers(user.output[0])
            if user.op_type in _MOVES
            else any(_comes_from(made_by, other) for other in user.input if other != name)
            for user in users.get(name, ())
        )

    nodes = []
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in constants or meets_integers(node.output[0]):
            nodes.append(node)
            continue
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        form = [1] * len(constants[node.input[0]].dims)
        scale, zero = (numpy_helper.to_array(constants[name]) for name in node.input[1:3])
        if scale.ndim:
            form[axis] = -1
        nodes += _plain(graph, node, scale.reshape(form), zero.reshape(form))
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in graph.node for name in node.input} | {port.name for port in graph.output}
    kept = [one for one in graph.initializer if one.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _plain(graph: Any, node: Any, scale: Any, zero: Any) -> list[Any]:
    """(integers - zero) * scale in operators that engines fold."""
    from onnx import helper, numpy_helper

    name, kind = node.output[0], helper.np_dtype_to_tensor_dtype(scale.dtype)
    _narrow(graph, node.input[0])
    made = [helper.make_node("Cast", [node.input[0]], [f"{name}_levels"], to=kind)]
    graph.initializer.append(numpy_helper.from_array(scale, f"{name}_scale"))
    if zero.any():
        graph.initializer.append(numpy_helper.from_array(zero.astype(scale.dtype), f"{name}_zero"))
        made.append(helper.make_node("Sub", [made[-1].output[0], f"{name}_zero"], [f"{name}_shifted"]))
    return [*made, helper.make_node("Mul", [made[-1].output[0], f"{name}_scale"], [name])]


def _narrow(graph: Any, name: str) -> None:
    """Stores integers of at most 4 bits two to a byte, as ONNX's INT4."""
    from onnx import TensorProto, helper, numpy_helper

    tensor = next(one for one in graph.initializer if one.name == name)
    values = numpy_helper.to_array(tensor)
    if tensor.data_type == TensorProto.INT8 and four_bits(values):
        flat = np.pad(values.ravel(), (0, values.size % 2)).astype(np.uint8) & 15
        tensor.CopyFrom(helper.make_tensor(name, TensorProto.INT4, values.shape, (flat[::2] | flat[1::2] << 4).tobytes(), raw=True))


def _comes_from(made_by: dict[str, Any], name: str) -> bool:
    """Whether a value is dequantized data, or that in another shape."""
    node = made_by.get(name)
    while node is not None and node.op_type in _MOVES:
        node = made_by.get(node.input[0])
    return node is not None and node.op_type == "DequantizeLinear" and node.input[0] in made_by
