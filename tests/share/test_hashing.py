"""Hashed weights: which bucket each reads, that buckets alone are stored, that they train, and what is refused."""

import onnx
import pytest
import torch
from torch import nn

import multum
from multum import Task, compress
from multum.distill import Logits
from multum.errors import StepError
from multum.export import to_onnx_bytes
from multum.graph.model import aten
from multum.quantize import Static
from multum.share import Hashing
from multum.share.hashing import hashed, rule_of


class Network(nn.Module):
    """A table that is read as rows and as a matrix, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.conv = nn.Embedding(60, 12), nn.Conv1d(12, 24, 3, padding=1)
        self.inner, self.head = nn.Linear(24, 12), nn.Linear(12, 60, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(torch.relu(self.conv(self.table(ids).mT)).mT)).mean(1)


def weights(graph: multum.Graph) -> dict[str, torch.Tensor]:
    """What each convolution and matrix product reads as its weight."""
    graph = graph.copy()
    nodes = graph.find(aten.conv1d.default, aten.linear.default)
    graph.tap([node.args[1] for node in nodes])
    graph(torch.zeros(1, 5, dtype=torch.long))
    return {str(node.meta["module"]): value.detach() for node, value in zip(nodes, graph.tapped, strict=True)}


@pytest.fixture(scope="module")
def task() -> Task:
    batches = [
        (torch.randint(0, 60, (16, 5), generator=torch.Generator().manual_seed(seed)), torch.zeros(16, dtype=torch.long)) for seed in (0, 1)
    ]
    return Task(Network().eval(), batches[0][0][:4], train=batches, calibration=batches, loss=nn.functional.cross_entropy)


def test_the_hash_is_exact():
    rule, places = (2**31 - 3, 2**31 - 2, 2**31 - 4), [0, 1, 5, 2**31 - 2]
    found = hashed(torch.tensor(places), rule, 1000).tolist()
    prime = 2**31 - 1
    assert found == [((rule[0] * x + rule[1]) * x + rule[2]) % prime % 2000 for x in places]
    assert rule_of(0, "conv.weight") == (915739794, 84448389, 1680335683)
    assert rule_of(1, "conv.weight") != rule_of(0, "conv.weight") != rule_of(0, "head.weight")


def test_buckets_are_filled_evenly_and_pairs_meet_as_often_as_by_chance():
    places = hashed(torch.arange(100_000), rule_of(3, "weight"), 50)
    counts = torch.bincount(places, minlength=100).float()
    assert counts.min() > 850
    assert counts.max() < 1150
    for step in (1, 2, 9, 64):
        meet = float((places[step:] == places[:-step]).float().mean())
        assert 0.007 < meet < 0.013


def test_each_weight_is_the_bucket_that_the_rule_says(task):
    graph = compress(task, Hashing(ratio=0.125)).graph
    for name, value in weights(graph).items():
        tensor = "table.weight" if name == "head" else f"{name}.weight"
        buckets = graph.tensor(f"{tensor}_buckets").detach()
        assert len(buckets) == round(value.numel() / 8)
        places = hashed(torch.arange(value.numel()), rule_of(0, tensor), len(buckets))
        assert torch.equal(value.flatten(), torch.cat([buckets, -buckets])[places])
        members = torch.where(places == 0, 1.0, 0.0) - torch.where(places == len(buckets), 1.0, 0.0)
        expected = (task.original.tensor(tensor).flatten() * members).sum() / members.abs().sum()
        torch.testing.assert_close(buckets[0], expected.detach())


def test_a_table_reads_the_same_as_rows_and_as_a_matrix(task):
    graph = compress(task, Hashing(include="table")).graph
    whole, rows = compress(task, Hashing(include=("table", "head"))).graph, torch.randint(0, 60, (2, 5))
    assert torch.equal(graph(rows), whole(rows))
    table = weights(whole)["head"]
    plain = task.original.copy()
    plain.set_tensor("table.weight", table)
    torch.testing.assert_close(whole(rows), plain(rows))


def test_files_and_onnx_hold_buckets_alone(task, tmp_path):
    result = compress(task, [Hashing(ratio=0.125), Logits(epochs=2.0)])
    before = compress(task, Hashing(ratio=0.125)).graph.tensor("conv.weight_buckets")
    assert not torch.equal(before, result.graph.tensor("conv.weight_buckets"))
    count = sum(parameter.numel() for parameter in task.original.parameters())
    assert multum.save(result, tmp_path / "model.mip", task) < 4 * count / 8 + 1500
    loaded, ids = multum.load(tmp_path / "model.mip"), torch.randint(0, 60, (3, 5))
    assert torch.equal(loaded(ids), result.graph(ids))
    assert loaded(ids[:1]).shape == (1, 60)
    stored = onnx.load_from_string(to_onnx_bytes(loaded)).graph.initializer
    assert sum(int(torch.Size(one.dims).numel()) for one in stored) < count / 8 + 200  # biases are 36
    multum.export(result.graph, tmp_path / "model.onnx")


def test_fusion_leaves_the_rule_in_place(task):
    graph = compress(task, [Hashing(include="conv"), Static()]).graph
    assert not [name for name, _ in graph.named_tensors() if name.startswith("constants")]
    assert len(graph.tensor("conv.weight_buckets")) == 216


def test_what_is_refused_and_skipped(task):
    for ratio in (0.0, 1.0):
        with pytest.raises(StepError, match="ratio"):
            Hashing(ratio=ratio)
    quantized = compress(task, multum.quantize.WeightOnly()).graph
    assert set(Hashing().plan(quantized, task).skipped.values()) == {"its weight is quantized"}
    assert Hashing(exclude="conv").plan(task.original, task).skipped == {"conv": "excluded by name"}
