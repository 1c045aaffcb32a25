"""Ranges measured in every call."""

from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

import multum
from multum.errors import StepError
from multum.export import to_onnx_bytes, verify
from multum.graph import layers
from multum.quantize import Dynamic, Static, WeightOnly
from multum.step import compress
from multum.task import Task


def task() -> Task:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 5))
    return Task(model, torch.randn(4, 7, 32))


def test_the_grid_by_hand() -> None:
    model = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(4) * 1.27)
    graph = compress(Task(model, torch.randn(2, 4)), Dynamic()).graph
    x = torch.tensor([[-0.51, 2.04, 0.004, 0.013]])  # 255 steps of 0.01 from -0.51: 0 at 51
    assert graph(x)[0].tolist() == pytest.approx([-0.51 * 1.27, 2.04 * 1.27, 0.0, 0.01 * 1.27], abs=1e-6)
    assert graph(torch.zeros(1, 4)).abs().max() == 0
    high = torch.tensor([[1.0, 2.0, 2.55, 0.5]])  # zero is in the range, whatever comes
    assert graph(high)[0].tolist() == pytest.approx((1.27 * high[0]).tolist(), abs=1e-6)


def test_linear_layers_run_as_integers(tmp_path: Path) -> None:
    made = task()
    result = compress(made, Dynamic())
    content = to_onnx_bytes(result.graph)
    kinds = [node.op_type for node in onnx.load_from_string(content).graph.node]
    assert kinds.count("MatMulInteger") == kinds.count("DynamicQuantizeLinear") == 3
    assert not {"MatMul", "Gemm"} & set(kinds)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "run.onnx")
    ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    run = {node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node}
    assert run & {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
    assert not {"MatMul", "Gemm", "FusedGemm"} & run
    assert verify(result.graph, content, [torch.randn(6, 7, 32)]).cosine > 0.9999
    assert len(content) < 0.5 * sum(p.numel() * 4 for p in made.model.parameters())


def test_one_value_that_many_read_is_quantized_once() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q(x) * self.k(x) + self.v(x)

    graph = compress(Task(Three(), torch.randn(2, 8)), Dynamic()).graph
    kinds = [node.op_type for node in onnx.load_from_string(to_onnx_bytes(graph)).graph.node]
    assert kinds.count("DynamicQuantizeLinear") == 1
    assert kinds.count("MatMulInteger") == 3


def test_the_file_holds_integers_and_gives_the_same(tmp_path: Path) -> None:
    made = task()
    result = compress(made, Dynamic())
    multum.save(result, tmp_path / "m.mip", made)
    with torch.no_grad():
        assert torch.equal(multum.load(tmp_path / "m.mip")(made.example), result.graph(made.example))


def test_others_are_rounded_alone_and_weights_on_grids_stay() -> None:
    torch.manual_seed(0)
    made = Task(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)), torch.randn(2, 3, 8, 8))
    result = compress(made, [WeightOnly(bits=4, edges=4), Dynamic()])
    record = result.records[1]
    assert "no integer kernel" in record.skipped["0"]
    assert set(record.changes["3"]) == {"input"}
    assert all(layer.quantizer() is not None for layer in layers(result.graph))
    assert verify(result.graph, to_onnx_bytes(result.graph)).cosine > 0.9999


@pytest.mark.parametrize("second", [Dynamic(), Static(samples=4)], ids=str)
def test_activations_are_quantized_once(second: multum.Step) -> None:
    made = task()
    made.calibration = [(made.example, 0)]
    with pytest.raises(StepError, match="quantized already"):
        compress(made, [Dynamic(), second])
