"""Promise 5: an exported file was run and agrees with the compressed model; int8 weights are int8 in it."""

import numpy as np
import onnx
import pytest

import multum
from multum.analyze.statistics import agreement
from multum.errors import ExportError
from multum.export import verify
from multum.prune import Channels
from multum.quantize import Half, Static, WeightOnly


@pytest.mark.parametrize(
    "steps", [[Channels(ratio=0.5)], [Static()], [Channels(ratio=0.25), Static()], [WeightOnly(bits=4), Static(), Half()]], ids=str
)
def test_onnx_and_mip_agree_with_the_graph(task, steps, tmp_path):
    result = multum.compress(task, steps)
    multum.save(result, tmp_path / "model.mip", task)
    multum.export(result.graph, tmp_path / "model.onnx")
    x = task.validation[0][0]
    expected = result.graph(x).detach()
    for file in ("model.onnx", "model.mip"):
        found = multum.Session(tmp_path / file, engine="onnxruntime").predict(x)
        cosine = float((expected * found).sum() / (expected.norm() * found.norm()))
        assert cosine >= 0.999, file
        assert agreement(expected, found) >= 98.0, file  # one of 64 samples may lie on the edge


def test_integer_weights_are_integers_in_the_file(task, tmp_path):
    multum.export(multum.compress(task, Static()).graph, tmp_path / "model.onnx")
    tensors = onnx.load(tmp_path / "model.onnx").graph.initializer
    floats = sum(np.prod(t.dims) for t in tensors if t.data_type == onnx.TensorProto.FLOAT)
    integers = sum(np.prod(t.dims) for t in tensors if t.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8))
    weights = sum(p.numel() for p in task.model.parameters() if p.ndim > 1)
    assert integers >= weights
    assert floats < 0.1 * weights


def test_a_file_that_computes_something_else_is_refused(task, tmp_path):
    path = multum.export(task.original, tmp_path / "model.onnx")
    other = multum.compress(task, Channels(ratio=0.75)).graph
    with pytest.raises(ExportError):
        verify(other, path)
