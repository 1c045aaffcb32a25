"""Totals and rows of whole networks, worked by hand; memory; time."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from multum.analyze import Analysis, analyze
from multum.errors import TaskError
from multum.graph import capture
from multum.graph.model import aten
from multum.task import Task

torch.set_num_threads(1)
MODEL = Path(__file__).parents[2] / "examples" / "fashion_mnist" / "model.py"


@pytest.fixture(scope="module")
def resnet() -> Analysis:
    description = importlib.util.spec_from_file_location("fashion_mnist_model", MODEL)
    module = importlib.util.module_from_spec(description)
    description.loader.exec_module(module)
    return analyze(module.ResNet20(), torch.randn(4, 1, 28, 28), latency=False)


def test_resnet_20(resnet: Analysis) -> None:
    stem = 14 * 14 * 16 * 9
    first = 6 * 14 * 14 * 16 * 144
    second = 7 * 7 * 32 * (144 + 16) + 5 * 7 * 7 * 32 * 288
    third = 4 * 4 * 64 * (288 + 32) + 5 * 4 * 4 * 64 * 576
    assert resnet.macs == stem + first + second + third + 64 * 10 == 8_523_968
    assert resnet.parameters == 272_186
    assert resnet.parameters == sum(row.parameters for row in resnet.layers)
    assert resnet.bytes == sum(row.bytes for row in resnet.layers) == 4 * (272_186 + 2 * (7 * 16 + 7 * 32 + 7 * 64))
    assert resnet.uncounted == {}


def test_resnet_20_row_by_row(resnet: Analysis) -> None:
    rows = {row.name: row for row in resnet.layers}
    assert (rows["conv"].kind, rows["conv"].parameters, rows["conv"].macs) == ("conv", 144, 28_224)
    assert rows["blocks.3.short.0"].macs == 7 * 7 * 32 * 16
    assert rows["blocks.3.short.0"].tensors == ["blocks.3.short.0.weight"]
    assert rows["blocks.0.bn1"].bytes == 4 * 4 * 16  # weight, bias, mean, variance
    assert rows["blocks.0.conv1"].activations == 4 * 16 * 14 * 14
    assert (rows["head"].parameters, rows["head"].macs, rows["head"].activations) == (650, 640, 40)
    assert (rows["relu"].kind, rows["relu"].parameters, rows["relu"].macs) == ("operator", 0, 0)
    assert next(iter(rows)) == "conv"


def test_peak_memory_of_a_residual_block(resnet: Analysis) -> None:
    # input of the block, result of its second norm, and their sum: three maps [16, 14, 14]
    assert resnet.memory == 3 * 4 * 16 * 14 * 14


def test_an_example_cut_from_all_the_data_counts_as_one_sample() -> None:
    data = torch.randn(1000, 6)
    assert analyze(nn.Linear(6, 4), data[:2], latency=False).memory == 4 * (6 + 4)


class Encoder(nn.Module):
    """One layer of BERT: attention in h heads, then two linear layers, each with a residual and a norm."""

    def __init__(self, d: int, h: int, inner: int) -> None:
        super().__init__()
        self.h = h
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, inner), nn.Linear(inner, d)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        n, s, d = x.shape
        q, k, v = (f(x).view(n, s, self.h, d // self.h).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, s, d)
        x = self.norm1(x + self.o(y))
        return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))


def test_a_layer_of_bert() -> None:
    d, h, inner, s = 24, 4, 96, 10
    found = analyze(Encoder(d, h, inner), torch.randn(2, s, d), latency=False)
    assert found.macs == 4 * s * d * d + 2 * s * s * d + 2 * s * d * inner
    assert found.parameters == 4 * (d * d + d) + 2 * d * inner + inner + d + 4 * d
    rows = {row.name: row for row in found.layers}
    assert rows["scaled_dot_product_attention"].macs == 2 * s * s * d
    assert rows["up"].macs == s * d * inner
    assert not [name for name in rows if name.startswith("sym_size")]  # sizes are no operators
    assert found.uncounted == {}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.place = nn.Parameter(torch.zeros(1, 5, 6))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words(x) + self.place)


def test_tied_weights_count_once_and_loose_ones_at_all() -> None:
    found = analyze(Tied(), torch.zeros(3, 5, dtype=torch.long), latency=False)
    assert found.parameters == 11 * 6 + 5 * 6
    rows = {row.kind: row for row in found.layers}
    assert (rows["embedding"].parameters, rows["linear"].parameters, rows["operator"].parameters) == (66, 0, 30)
    assert rows["linear"].macs == 5 * 6 * 11  # it is computed although it is not held twice
    assert found.bytes == 4 * found.parameters


def test_a_quantized_weight_belongs_to_its_layer() -> None:
    graph = capture(nn.Linear(6, 4), torch.randn(2, 6))
    node = graph.find(aten.linear.default)[0]
    graph.set_tensor("weight_scale", torch.ones(4))
    graph.set_tensor("weight_zero", torch.zeros(4, dtype=torch.int32))
    scale, zero = graph.attribute("weight_scale", node), graph.attribute("weight_zero", node)
    with graph.fx.inserting_before(node):
        quantized = graph.fx.call_function(aten.fake_quantize_per_channel_affine.default, (node.args[1], scale, zero, 0, -8, 7))
    node.update_arg(1, quantized)
    graph.recompile()
    graph.refresh()
    found = analyze(graph, latency=False)
    layer = next(row for row in found.layers if row.kind == "linear")
    assert (layer.parameters, layer.bytes, layer.macs) == (28, 4 * (24 + 4 + 4 + 4), 24)
    assert found.bytes == layer.bytes
    assert found.uncounted == {}


def test_every_operator_is_timed_at_batch_one_and_nothing_is_changed() -> None:
    task = Task(Encoder(24, 4, 96), torch.randn(8, 10, 24))
    before = task.original.fingerprint()
    found = analyze(task)
    assert all(row.ms is not None and row.ms > 0 for row in found.layers)
    assert found.ms is not None
    assert found.ms > 0
    assert found.threads == 1
    assert task.original.fingerprint() == before
    rows = {row.name: row for row in found.layers}
    assert rows["up"].activations == 4 * 10 * 96  # one sample of the eight
    data = json.loads(json.dumps(found.to_data()))
    assert data["total"]["macs"] == found.macs
    assert [row["name"] for row in data["layers"]] == list(rows)


def test_a_slower_operator_reads_slower() -> None:
    found = analyze(nn.Sequential(nn.Linear(16, 1024), nn.ReLU(), nn.Linear(1024, 1024)), torch.randn(2, 16))
    rows = {row.name: row for row in found.layers}
    assert rows["2"].ms > 3 * rows["0"].ms


def test_without_timing_there_are_no_milliseconds() -> None:
    found = analyze(capture(nn.Linear(3, 2), torch.randn(2, 3)), latency=False)
    assert found.ms is None
    assert [row.ms for row in found.layers] == [None]


def test_a_model_needs_an_example() -> None:
    with pytest.raises(TaskError, match="given a Linear and no example"):
        analyze(nn.Linear(3, 2))
