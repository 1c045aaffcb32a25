"""ONNX files: the same outputs on every model, integers as the graph stores them, integer kernels, and nothing unverified."""

import importlib
import json
from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import multum
from multum import capture
from multum.errors import ExportError, FileError
from multum.export import to_onnx_bytes, verify
from multum.export.onnx import _input_names, _names
from multum.graph import Graph, layers
from multum.graph.file import to_data
from multum.graph.model import aten
from multum.graph.spec import spec_of
from multum.testing import CONFIGS, ZOO

PER_CHANNEL = aten.fake_quantize_per_channel_affine.default
LEARNABLE = aten._fake_quantize_learnable_per_channel_affine.default
PER_TENSOR = aten.fake_quantize_per_tensor_affine.tensor_qparams


def quantize_weights(graph: Graph, bits: int = 8, learnable: bool = False) -> Graph:
    """A symmetric quantizer per output channel before every weight."""
    high = 2 ** (bits - 1) - 1
    for layer in layers(graph):
        if layer.kind not in ("conv", "linear", "embedding") or layer.quantizer() is not None:
            continue
        weight = graph.tensor(layer.weight).detach()
        scale = weight.abs().amax([d for d in range(weight.ndim) if d != layer.scale_axis]) / high
        parts = {"scale": scale, "zero": torch.zeros(len(scale), dtype=torch.float32 if learnable else torch.int32)}
        for part, value in parts.items():
            graph.set_tensor(f"{layer.weight}_{part}", value)
        reads = [graph.attribute(f"{layer.weight}_{part}", layer.node) for part in parts]
        operand = layer.node.args[layer.position]
        with graph.fx.inserting_before(layer.node):
            target, rest = (LEARNABLE, (1.0,)) if learnable else (PER_CHANNEL, ())
            quantizer = graph.fx.call_function(target, (operand, *reads, layer.scale_axis, -high - 1, high, *rest))
        layer.node.update_arg(layer.position, quantizer)
    graph.recompile()
    graph.refresh()
    return graph


def quantize_value(graph: Graph, node, scale: float, zero: int, low: int = 0, high: int = 255) -> None:
    """A quantizer of an activation, between `node` and everything that reads it."""
    users = list(node.users)
    graph.set_tensor(f"{node.name}_scale", torch.tensor([scale]))
    graph.set_tensor(f"{node.name}_zero", torch.tensor([zero], dtype=torch.int32))
    first = min(users)
    reads = [graph.attribute(f"{node.name}_{part}", first) for part in ("scale", "zero")]
    with graph.fx.inserting_before(first):
        quantizer = graph.fx.call_function(PER_TENSOR, (node, *reads, low, high))
    for user in users:
        user.replace_input_with(node, quantizer)
    graph.recompile()
    graph.refresh()


def pair(bits: int = 8) -> Graph:
    """Convolution, ReLU and linear layer; weights and every value between them quantized."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    graph = quantize_weights(capture(model, torch.randn(2, 2, 6, 6)))
    high = 2**bits - 1
    (place,) = (node for node in graph.fx.nodes if node.op == "placeholder")
    (linear,) = graph.find(aten.linear.default)
    for node, width, zero in (
        (linear, 3.0, high // 2),
        (graph.find(aten.avg_pool2d.default)[0], 2.0, 0),
        (graph.find(aten.relu.default)[0], 2.0, 0),
    ):
        quantize_value(graph, node, width / high, zero, 0, high)
    quantize_value(graph, place, 8.0 / high, high // 2, 0, high)
    return graph


def loaded(content: bytes) -> onnx.ModelProto:
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    return model


def kinds(model: onnx.ModelProto) -> Counter:
    return Counter(node.op_type for node in model.graph.node)


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}


def optimized(content: bytes, folder) -> Counter:
    """The operators that ONNX Runtime really runs."""
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 3
    ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return kinds(onnx.load(folder / "optimized.onnx"))


FAST = ("resnet", "keyword_inputs")


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ZOO])
def test_every_model_of_the_zoo(name):
    if name in CONFIGS:
        pytest.importorskip("transformers")
    model, example = ZOO[name]()
    graph = capture(model, example)
    before = graph.fingerprint()
    content = to_onnx_bytes(graph)
    found = verify(graph, content)
    assert found.cosine > 0.99999
    assert found.largest_difference < 1e-4
    assert found.samples == 16
    assert found.agreement is None
    assert graph.fingerprint() == before
    file = loaded(content)
    assert all(port.type.tensor_type.shape.dim[0].dim_param == "batch" for port in (*file.graph.input, *file.graph.output))
    assert not file.graph.value_info
    assert not any(node.metadata_props for node in file.graph.node)
    properties = {prop.key: prop.value for prop in file.metadata_props}
    assert json.loads(properties["multum.io"]) == {"inputs": graph.inputs, "outputs": graph.outputs}
    assert properties["multum.fingerprint"] == before


def test_names_and_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.block = nn.Embedding(1000, 16), nn.Linear(16, 16)

        def forward(self, tokens):
            return nn.functional.linear(self.block(self.table(tokens)), self.table.weight)

    model = Tied()
    file = loaded(to_onnx_bytes(capture(model, torch.ones(2, 6, dtype=torch.long))))
    assert [port.name for port in (*file.graph.input, *file.graph.output)] == ["input", "output"]
    assert sum(value.nbytes for value in constants(file).values()) < 1.1 * sum(p.nbytes for p in model.parameters())
    assert "block.bias" in constants(file)


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((1,), {}, ["input"]),
        ((1, 1), {}, ["input_0", "input_1"]),
        (((1, 1),), {}, ["input_0_0", "input_0_1"]),
        ((), {"input_ids": 1, "attention mask": 1}, ["input_ids", "attention_mask"]),
        ((1,), {"input": 1}, ["input", "input_1"]),
        ((), {"a": {"x": 1}, "a_x": 1}, ["a_x", "a_x_1"]),
    ],
)
def test_inputs_have_readable_unique_names(args, kwargs, expected):
    def tensor(value):
        return (
            torch.ones(1)
            if value == 1
            else type(value)({k: tensor(v) for k, v in value.items()} if isinstance(value, dict) else map(tensor, value))
        )

    assert _input_names(spec_of((tensor(args), tensor(kwargs)))) == expected


def test_outputs_have_readable_names():
    one = torch.ones(1)
    assert _names(spec_of(one), "output") == ["output"]
    assert _names(spec_of((one, {"left": one, 3: one})), "output") == ["output_0", "output_1_left", "output_1_3"]
    assert _names(spec_of({"logits": one}), "output") == ["logits"]


@pytest.mark.parametrize(("bits", "learnable"), [(8, False), (3, True)])
def test_weights_are_the_integers_of_the_graph(bits, learnable):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    graph = quantize_weights(capture(model, torch.randn(2, 2, 6, 6)), bits, learnable)
    stored = to_data(graph)[1]
    content = to_onnx_bytes(graph)
    found = constants(loaded(content))
    for name in ("0.weight", "3.weight"):
        assert str(found[f"{name}_integers"].dtype) == ("int8" if bits == 8 else "int4")
        np.testing.assert_array_equal(found[f"{name}_integers"].astype(np.int8), stored[name].numpy())
        assert name not in found
    assert not any(value.dtype == np.float32 and value.ndim > 1 and value.size > 16 for value in found.values())
    assert verify(graph, content).cosine > 0.999999


def test_integer_weights_that_meet_floats_cost_nothing_at_run_time(tmp_path):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    content = to_onnx_bytes(quantize_weights(capture(model, torch.randn(2, 8))))
    assert "DequantizeLinear" not in kinds(loaded(content))
    assert set(optimized(content, tmp_path)) <= {"Gemm", "FusedGemm", "Relu"}


def test_a_quantized_network_runs_as_integers(tmp_path):
    graph = pair()
    content = to_onnx_bytes(graph)
    file = loaded(content)
    assert kinds(file)["QuantizeLinear"] == 4
    assert {value.dtype for name, value in constants(file).items() if name.endswith("_uint8")} == {np.dtype(np.uint8)}
    run = optimized(content, tmp_path)
    assert run["QLinearConv"] == 1
    assert run["QGemm"] == 1
    assert run["QLinearAveragePool"] == 1
    assert "Conv" not in run
    assert "Gemm" not in run
    assert verify(graph, content, [torch.randn(64, 2, 6, 6)]).agreement == 1.0


@pytest.mark.parametrize("bits", [4, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (2, 7))])
def test_narrow_activations_are_cut_to_their_range(bits, tmp_path):
    graph = pair(bits)
    content = to_onnx_bytes(graph)
    x = 10 * torch.randn(64, 2, 6, 6)  # far outside the range of 8
    run = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    levels = np.unique(np.round(run.run(None, {"input": x.numpy()})[0] * (2**bits - 1) / 3.0).astype(int))
    assert levels.max() - levels.min() <= 2**bits - 1
    assert verify(graph, content, [x]).cosine > 0.999
    assert optimized(content, tmp_path)["QLinearConv"] == 1


def test_activations_that_no_integer_type_holds_are_refused():
    graph = capture(nn.Linear(3, 2), torch.randn(2, 3))
    quantize_value(graph, graph.find(aten.linear.default)[0], 0.1, 0, 0, 2**17)
    with pytest.raises(ExportError, match=r"is quantized to 0\.\.131072"):
        to_onnx_bytes(graph)


def test_a_table_is_looked_up_as_integers_that_it_shares_with_the_tied_head():
    model, example = ZOO["tied_weights"]()
    graph = quantize_weights(capture(model, example))
    content = to_onnx_bytes(graph)
    file = loaded(content)
    (table,) = [name for name, value in constants(file).items() if value.dtype == np.int8 and value.size == 40 * 16]
    assert table in [node.input[0] for node in file.graph.node if node.op_type == "Gather"]
    assert table in [node.input[0] for node in file.graph.node if node.op_type == "Cast"]
    assert not any(value.dtype == np.float32 and value.size > 100 for value in constants(file).values())
    assert verify(graph, content).cosine > 0.999999


def test_four_bits_take_half_a_byte_and_run_in_both_engines(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(300, 64), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 4))
    graph = quantize_weights(capture(model, torch.randint(300, (2, 5))), bits=4)
    content = to_onnx_bytes(graph)
    assert len(content) < sum(p.numel() for p in model.parameters()) / 2 + 12_000
    assert verify(graph, content).cosine > 0.999999
    (tmp_path / "m.onnx").write_bytes(content)
    tokens = torch.arange(300).reshape(60, 5)  # every row of the table
    with torch.no_grad():
        expected = graph(tokens)
    for engine, close in (("onnxruntime", 1e-4), ("openvino", 2e-2)):  # OpenVINO rounds inputs of compressed weights to 8 bits
        found = multum.Session(tmp_path / "m.onnx", engine=engine, threads=1).predict(tokens)
        assert (found - expected).abs().max() < close * expected.abs().max()


def test_one_weight_on_two_grids_is_stored_on_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return nn.functional.linear(torch.relu(nn.functional.linear(x, self.weight)), self.weight)

    graph = capture(Twice(), torch.randn(2, 4))
    for index, linear in enumerate(graph.find(aten.linear.default)):
        graph.set_tensor(f"scale{index}", torch.full((4,), 0.02 * (1 + 4 * index)))
        graph.set_tensor(f"zero{index}", torch.zeros(4, dtype=torch.int32))
        reads = [graph.attribute(f"{part}{index}", linear) for part in ("scale", "zero")]
        with graph.fx.inserting_before(linear):
            linear.update_arg(1, graph.fx.call_function(PER_CHANNEL, (linear.args[1], *reads, 0, -128, 127)))
    graph.recompile()
    graph.refresh()
    content = to_onnx_bytes(graph)
    assert sum(value.dtype == np.int8 and value.ndim == 2 for value in constants(loaded(content)).values()) == 2
    assert verify(graph, content).cosine > 0.999999


def test_the_file_of_a_quantized_network_is_small():
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
    graph = capture(model, torch.randn(2, 256))
    whole = len(to_onnx_bytes(graph))
    assert len(to_onnx_bytes(quantize_weights(graph))) < 0.27 * whole


# --- verification --------------------------------------------------------------------------------------------------


def test_another_network_is_found_out_and_operators_are_named():
    model = nn.Sequential(nn.Linear(6, 8), nn.Softmax(-1), nn.Linear(8, 4))
    graph = capture(model, torch.randn(2, 6))
    content = to_onnx_bytes(graph)
    with torch.no_grad():
        graph.tensor("2.weight").mul_(-1)
    with pytest.raises(ExportError, match=r"something else than the graph: cosine -?0\.") as caught:
        verify(graph, content)
    assert "Softmax" in caught.value.do
    assert "Gemm" not in caught.value.do


def test_labels_are_compared_on_held_inputs():
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2))
    graph = capture(layer, torch.randn(2, 2))
    content = to_onnx_bytes(graph)
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(50, 1)
    assert verify(graph, content, [x]).agreement == 1.0
    assert verify(graph, content, [x]).samples == 100
    with torch.no_grad():
        graph.tensor("weight").copy_(torch.eye(2) * 1.001)
    assert verify(graph, content, [x]).largest_difference == pytest.approx(0.001, rel=1e-3)


def test_labels_that_the_graph_holds_for_equal_count_as_the_same():
    layer = nn.Linear(1, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0], [0.999], [-1.0]]))
    graph = capture(layer, torch.randn(2, 1))
    content, x = to_onnx_bytes(graph), torch.ones(100, 1)
    with torch.no_grad():
        graph.tensor("weight")[1] = 1.005  # the standard deviation is 0.94, a fiftieth of it is 0.019
    assert verify(graph, content, [x]).agreement == 1.0
    with torch.no_grad():
        graph.tensor("weight")[1] = 1.05
    with pytest.raises(ExportError, match=r"labels agree on 0\.0% of 100 samples"):
        verify(graph, content, [x])


def test_verification_needs_inputs():
    graph = capture(nn.Linear(2, 2), torch.randn(2, 2))
    with pytest.raises(ExportError, match="No inputs"):
        verify(graph, to_onnx_bytes(graph), [])


def test_what_does_not_load_is_an_error():
    graph = capture(nn.Linear(2, 2), torch.randn(2, 2))
    with pytest.raises(ExportError, match="does not load"):
        verify(graph, b"no model")


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_file_is_written_and_runs(tmp_path, capsys, caplog, recwarn):
    graph = capture(nn.Linear(3, 2), torch.randn(2, 3))
    path = multum.export(graph, tmp_path / "model.onnx", inputs=[torch.randn(8, 3)])
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert verify(graph, path).cosine > 0.99999
    assert capsys.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert not list(recwarn)


def test_formats_that_are_not_there_are_listed(tmp_path):
    with pytest.raises(ExportError, match="no export to 'tflite'") as caught:
        multum.export(capture(nn.Linear(3, 2), torch.randn(2, 3)), tmp_path / "model.tflite", to="tflite")
    assert caught.value.expected == "one of onnx"


def test_what_is_not_a_graph_is_refused(tmp_path):
    with pytest.raises(ExportError, match="A str is to be exported") as caught:
        multum.export("model.mip", tmp_path / "model.onnx")
    assert "multum.load" in caught.value.do


def test_nothing_is_left_when_the_file_cannot_be_written(tmp_path):
    graph = capture(nn.Linear(3, 2), torch.randn(2, 3))
    with pytest.raises(FileError, match="cannot be written"):
        multum.export(graph, tmp_path / "missing" / "model.onnx")
    (tmp_path / "model.onnx").mkdir()
    with pytest.raises(FileError, match="cannot be written"):
        multum.export(graph, tmp_path / "model.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_models_above_the_limit_of_the_format_are_refused(monkeypatch):
    monkeypatch.setattr(importlib.import_module("multum.export.onnx"), "_LARGEST", 20)
    with pytest.raises(ExportError, match="of tensors") as caught:
        to_onnx_bytes(capture(nn.Linear(3, 2), torch.randn(2, 3)))
    assert "2 GB" in caught.value.expected


def test_an_operator_that_onnx_lacks_is_named():
    class Odd(nn.Module):
        def forward(self, x):
            return torch.linalg.svdvals(x)

    with pytest.raises(ExportError, match="svd"):
        to_onnx_bytes(capture(Odd(), torch.randn(2, 3, 3)))
