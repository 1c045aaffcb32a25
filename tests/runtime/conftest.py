"""Small ONNX files, written by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

Make = Callable[..., Path]


@pytest.fixture(scope="session")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Writes ``relu(x @ w)`` repeated ``depth`` times; x is [batch, width] and every w is a scaled identity, so outputs are known."""

    def make(name: str = "linear", width: int = 4, depth: int = 1, scale: float = 2.0, batch: str | int = "batch") -> Path:
        nodes, weights, last = [], [], "x"
        for i in range(depth):
            weights.append(numpy_helper.from_array(np.eye(width, dtype=np.float32) * scale, f"w{i}"))
            nodes += [helper.make_node("MatMul", [last, f"w{i}"], [f"m{i}"]), helper.make_node("Relu", [f"m{i}"], [f"r{i}"])]
            last = f"r{i}"
        ends = [helper.make_tensor_value_info(one, TensorProto.FLOAT, [batch, width]) for one in ("x", last)]
        return write(tmp_path_factory.mktemp("onnx") / f"{name}.onnx", nodes, ends[:1], ends[1:], weights)

    return make


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Writes a model of two inputs (a float, ids int64) and two outputs (a + 1, ids * 2), with ``io`` in its metadata."""

    def make(io: object = None, name: str = "two") -> Path:
        one = numpy_helper.from_array(np.array(1, np.float32), "one")
        doubled = numpy_helper.from_array(np.array(2, np.int64), "doubled")
        nodes = [helper.make_node("Add", ["a", "one"], ["more"]), helper.make_node("Mul", ["ids", "doubled"], ["twice"])]
        inputs = [
            helper.make_tensor_value_info("a", TensorProto.FLOAT, ["batch", 3]),
            helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch"]),
        ]
        outputs = [
            helper.make_tensor_value_info("more", TensorProto.FLOAT, ["batch", 3]),
            helper.make_tensor_value_info("twice", TensorProto.INT64, ["batch"]),
        ]
        return write(tmp_path_factory.mktemp("onnx") / f"{name}.onnx", nodes, inputs, outputs, [one, doubled], io)

    return make


def write(path: Path, nodes: list, inputs: list, outputs: list, weights: list, io: object = None) -> Path:
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    if io is not None:
        helper.set_model_props(model, {"multum.io": io if isinstance(io, str) else json.dumps(io)})
    onnx.save(model, path)
    return path
