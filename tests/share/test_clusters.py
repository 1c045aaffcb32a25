"""Codebooks: what they hold, where they are read, that they stay, and what is refused."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import nn

import multum
from multum import Task, compress
from multum.distill import Logits
from multum.errors import StepError
from multum.export import to_onnx_bytes
from multum.graph.model import aten
from multum.prune import Weights
from multum.quantize import Half, Static
from multum.share import Clusters
from multum.share.kmeans import assign, bits_of, kmeans


class Network(nn.Module):
    """A table that is read as rows and as a matrix, a convolution, a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.conv, self.lstm = nn.Embedding(60, 12), nn.Conv1d(24, 24, 3, padding=1), nn.LSTM(12, 24, batch_first=True)
        self.inner, self.head = nn.Linear(24, 12), nn.Linear(12, 60, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y, _ = self.lstm(self.table(ids))
        return self.head(self.inner(torch.relu(self.conv(y.mT)).mT)).mean(1)


@pytest.fixture(scope="module")
def task() -> Task:
    batches = [
        (torch.randint(0, 60, (16, 5), generator=torch.Generator().manual_seed(seed)), torch.zeros(16, dtype=torch.long)) for seed in (0, 1)
    ]
    loss = nn.functional.cross_entropy
    return Task(Network().eval(), batches[0][0][:4], train=batches, calibration=batches, validation=batches, loss=loss)


def weights(graph: multum.Graph) -> dict[str, torch.Tensor]:
    """What each convolution and matrix product reads as its weight."""
    graph = graph.copy()
    nodes = graph.find(aten.conv1d.default, aten.linear.default)
    graph.tap([node.args[1] for node in nodes])
    graph(torch.zeros(1, 5, dtype=torch.long))
    return {str(node.meta["module"]): value.detach() for node, value in zip(nodes, graph.tapped, strict=True)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 2, "scope": "channel"},
        {"scope": "model", "weighting": "fisher"},
        {"size": 2, "bits": 3, "scope": "channel"},
        {"start": "linear", "bits": 8},
        {"start": "density", "weighting": "none"},
        {"entropy": 2.0},
    ],
    ids=str,
)
def test_a_weight_has_as_many_values_as_its_codebook_in_every_form(task, tmp_path, options):
    step = Clusters(**options)
    result = compress(task, step)
    entries, size = 2**step.bits, step.size
    assert len(result.records[0].changes) >= 3
    for name, value in weights(result.graph).items():
        if name not in result.records[0].changes:
            continue
        groups = value.reshape(len(value), -1, size)
        if name == "head":  # a table has its channels in columns
            groups = groups.transpose(0, 1)
        groups = groups if step.scope == "channel" else groups.reshape(1, -1, size)
        assert all(len(group.unique(dim=0)) <= entries for group in groups), name
    assert multum.save(result, tmp_path / "model.mip", task) < 0.6 * 4 * sum(p.numel() for p in task.original.parameters())
    loaded = multum.load(tmp_path / "model.mip")
    ids = torch.randint(0, 60, (3, 5))
    assert torch.equal(loaded(ids), result.graph(ids))
    assert loaded(ids[:1]).shape == (1, 60)
    if step.size > 1:
        multum.export(result.graph, tmp_path / "model.onnx")  # runs it and compares


def test_more_bits_come_nearer(task):
    off = []
    for bits in (1, 3, 5, 8):
        graph = compress(task, Clusters(bits=bits, weighting="none")).graph
        off.append(float((graph(task.example) - task.original(task.example)).norm()))
    assert off == sorted(off, reverse=True)
    assert off[-1] < 0.05 * off[0]


def test_one_codebook_for_the_model_and_scales_for_its_layers(task):
    graph = compress(task, Clusters(scope="model")).graph
    names = [name for name, _ in graph.named_tensors()]
    assert [name for name in names if name.endswith("codebook")] == ["codebook"]
    assert sum(name.endswith("_scale") for name in names) == 5


def test_onnx_stores_indices_and_codebook_once(task):
    model = onnx.load_from_string(to_onnx_bytes(compress(task, Clusters()).graph))
    kinds = {one.name: numpy_helper.to_array(one).dtype for one in model.graph.initializer}
    assert sum(name.endswith("_indices") and kind == np.int8 for name, kind in kinds.items()) == 5
    assert sum(name.endswith("_codebook") for name in kinds) == 5
    assert sum(node.op_type == "Gather" for node in model.graph.node) >= 5
    assert all(np.prod(one.dims) < 200 for one in model.graph.initializer if one.data_type == onnx.TensorProto.FLOAT)


@pytest.mark.parametrize("then", [[Logits(epochs=4.0, learning_rate=0.05)], [Logits(), Half()], [Half()]], ids=str)
def test_clusters_stay_through_what_follows(task, then):
    graph, trained = compress(task, Clusters(bits=2)).graph, compress(task, [Clusters(bits=2), *then]).graph
    for name, value in weights(trained).items():
        assert len(value.unique()) <= 4, name
    if isinstance(then[0], Logits):
        assert not torch.equal(graph.tensor("conv.weight_codebook"), trained.tensor("conv.weight_codebook"))


def test_other_layers_are_quantized_as_ever(task):
    result = compress(task, [Clusters(bits=2, include="conv"), Static()])
    assert {"inner", "head"} <= set(result.records[1].changes)
    assert len(weights(result.graph)["conv"].unique()) <= 4


def test_the_gradient_of_an_entry_is_the_sum_over_its_weights(task):
    graph, plain = compress(task, Clusters(bits=2, include="conv")).graph, task.original.copy().requires_grad_(True)
    plain.set_tensor("conv.weight", weights(graph)["conv"])
    for one in (graph, plain):
        one(task.example).square().sum().backward()
    index = graph.tensor("conv.weight_indices").long()
    book = graph.tensor("conv.weight_codebook")
    index = index - index.min()
    expected = torch.zeros(4).index_add_(0, index.flatten(), plain.tensor("conv.weight").grad.flatten())
    torch.testing.assert_close(book.grad[:, 0], expected, rtol=1e-3, atol=1e-5)
    assert book.grad.abs().min() > 0


def test_a_table_alone_asks_for_no_gradients(task, monkeypatch):
    monkeypatch.setattr("multum.share.clusters.Evidence", None)
    assert list(compress(task, Clusters(include="table")).records[0].changes) == ["table"]
    with pytest.raises(TypeError):
        compress(task, Clusters(include="conv"))


def test_training_gains(task):
    def off(*steps):
        ours, theirs = (graph(task.train[0][0]).detach().softmax(1) for graph in (compress(task, list(steps)).graph, task.original))
        return float((ours - theirs).square().mean())

    assert off(Clusters(bits=2), Logits(epochs=40.0, alpha=1.0, learning_rate=0.01, patience=0)) < 0.8 * off(Clusters(bits=2))


def test_zeros_that_pruning_set_stay(task):
    steps = [Weights(ratio=0.5, include=("conv", "inner"), samples=16), Clusters(bits=3), Logits(epochs=2.0, learning_rate=0.05)]
    before, after = (weights(compress(task, some).graph) for some in (steps[:1], steps))
    for name in ("conv", "inner"):
        assert (after[name][before[name] == 0] == 0).all()
        assert (after[name] != 0).any()


def test_fewer_bits_are_asked_for_and_reached(task, tmp_path):
    sizes = {}
    for entropy in (None, 1.5):
        result = compress(task, Clusters(entropy=entropy))
        sizes[entropy] = multum.save(result, tmp_path / "model.mip")
        assert entropy is None or 0.9 * entropy < result.records[0].measured["bits"] <= 1.01 * entropy
    assert sizes[1.5] < sizes[None]


def test_what_does_not_pay_stays_with_the_reason():
    task = Task(nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 40), nn.Linear(40, 40)), torch.randn(2, 7))
    plan = Clusters(size=8, bits=5).plan(task.original, task)
    assert list(plan.changes) == ["2"]
    assert plan.skipped["0"] == "its rows of 7 weights do not divide into vectors of 8"
    assert Clusters(size=3, bits=8).plan(task.original, task).skipped["1"] == "indices and codebook would take as much"
    quantized = compress(task, multum.quantize.WeightOnly()).graph
    assert Clusters().plan(quantized, task).skipped == dict.fromkeys("012", "its weight is quantized")


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 0},
        {"bits": 9},
        {"size": 0},
        {"scope": "row"},
        {"start": "random"},
        {"start": "linear", "size": 2},
        {"weighting": "hessian"},
        {"entropy": 4.0},
        {"entropy": 0.0},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(StepError):
        Clusters(**options)


@pytest.mark.parametrize("weighting", ["fisher", "curvature"])
def test_weighting_needs_data(weighting):
    task = Task(nn.Linear(8, 8), torch.randn(2, 8))
    with pytest.raises(StepError, match="needs"):
        compress(task, Clusters(weighting=weighting))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(20, 60), st.integers(1, 3), st.integers(2, 8), st.integers(0, 99), st.booleans())
def test_no_vector_is_nearer_to_another_entry_and_every_entry_is_the_mean_of_its_own(groups, n, size, entries, seed, zero):
    torch.manual_seed(seed)
    vectors, counted = torch.randn(groups, n, size, dtype=torch.double), torch.rand(groups, n, size, dtype=torch.double) + 0.1
    codebook = kmeans(vectors, counted, entries, seed=seed, zero=zero)
    index, cost = assign(vectors, counted, codebook, codebook.new_zeros(codebook.shape[:2]))
    every = (counted[:, :, None] * (vectors[:, :, None] - codebook[:, None]).square()).sum(3)
    torch.testing.assert_close(cost, every.amin(2))
    torch.testing.assert_close(every.gather(2, index[..., None])[..., 0], cost)
    assert not zero or (codebook == 0).all(2).any(1).all()
    one = kmeans(vectors, counted, 1)
    torch.testing.assert_close(one[:, 0], (counted * vectors).sum(1) / counted.sum(1))
    assert float(cost.sum()) <= float((counted * (vectors - one).square()).sum()) + 1e-9 or zero


def test_bits_are_the_entropy():
    index = torch.tensor([[0, 0, 1, 2]])
    assert bits_of(index, 4).tolist() == [[1.0, 2.0, 2.0, 3.0]]


def test_weights_that_choose_while_they_train_end_nearer_to_the_original(task):
    """Each option has its own way into the graph: groups, columns of a table, scales, prices, zeros that stay."""
    alike = replace(task, loss=None)

    def off(*steps):
        result = compress(alike, list(steps))
        graph = result.graph
        ours, theirs = (one(task.train[0][0]).detach().softmax(1) for one in (graph, task.original))
        return float((ours - theirs).square().mean()), graph, result.records[-1].measured

    soft = {"epochs": 20.0, "learning_rate": 0.01}
    for options in ({}, {"bits": 1, "scope": "channel"}, {"scope": "model", "size": 2}, {"entropy": 1.5}):
        options = {"bits": 2} | options
        least, (lost, graph, measured) = off(Clusters(**options))[0], off(Clusters(**options, **soft))
        assert lost < 0.5 * least, options
        assert measured["steps"] == 40
        assert measured["bits"] <= options.get("entropy", 8) * 1.2
        assert not [name for name, _ in graph.named_tensors() if name.endswith(("_counts", "_penalty", "_temperature"))]
        for name, value in weights(graph).items():
            groups = value.T if name == "head" and options.get("scope") == "channel" else value
            groups = groups.reshape(len(groups) if options.get("scope") == "channel" else 1, -1, options.get("size", 1))
            assert all(len(group.unique(dim=0)) <= 2 ** options["bits"] for group in groups), (options, name)
    pruned = Weights(ratio=0.5, include="conv", samples=16)
    before, after = weights(compress(task, pruned).graph)["conv"], weights(off(pruned, Clusters(bits=3, **soft))[1])["conv"]
    assert (after[before == 0] == 0).all()
    assert (after != 0).any()


def test_a_training_with_choices_is_kept_on_the_way(task, tmp_path, monkeypatch):
    monkeypatch.setattr("multum.train.loop.CHECKPOINT_SECONDS", 0.0)
    alike, step = replace(task, loss=None), Clusters(bits=2, scope="model", epochs=2.0, entropy=1.5)
    kept = compress(alike, step, workdir=tmp_path).graph
    assert compress(alike, step).graph.fingerprint() == kept.fingerprint()


def test_choosing_begins_where_nothing_is_lost():
    """Weights of four values under codebooks of four: the cost, and so the temperature, is nothing but rounding."""
    torch.manual_seed(0)
    model = nn.Linear(32, 32).eval()
    with torch.no_grad():
        model.weight.copy_(model.weight.sign() * (1 + (model.weight.abs() > 0.09)))
    x = torch.randn(8, 32)
    graph = compress(Task(model, x, train=[(x, torch.zeros(8))]), Clusters(bits=2, weighting="none", epochs=2.0)).graph
    torch.testing.assert_close(graph(x), model(x), rtol=0.1, atol=0.1)


def test_choosing_while_training_needs_data_to_train():
    with pytest.raises(StepError, match="needs"):
        compress(Task(nn.Linear(8, 8), torch.randn(2, 8)), Clusters(epochs=1.0))
    with pytest.raises(StepError, match="0 or more"):
        Clusters(epochs=-1.0)
