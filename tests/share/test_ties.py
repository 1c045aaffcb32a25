"""Layers that share one tensor: which do, what is left, that it stays, and what is refused."""

import re

import onnx
import pytest
import torch
from torch import nn

import multum
from multum import Task, compress
from multum.distill import Logits
from multum.errors import StepError
from multum.export import to_onnx_bytes
from multum.graph import layers
from multum.quantize import Static, WeightOnly
from multum.share import Ties
from multum.share.ties import similar


class Network(nn.Module):
    """Four residual blocks of two layers and a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.up, self.down = (nn.ModuleList(nn.Linear(a, b) for _ in range(4)) for a, b in ((16, 32), (32, 16)))
        self.norm = nn.ModuleList(nn.LayerNorm(16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for up, down, norm in zip(self.up, self.down, self.norm, strict=True):
            x = norm(x + down(torch.relu(up(x))))
        return self.head(x)


@pytest.fixture(scope="module")
def task() -> Task:
    batches = [(torch.randn(64, 6, generator=torch.Generator().manual_seed(s)), torch.zeros(64, dtype=torch.long)) for s in (0, 1)]
    return Task(Network().eval(), batches[0][0][:4], train=batches, calibration=batches, validation=batches)


def sharing(graph: multum.Graph, row: str) -> list[int]:
    """For each layer of a row, which of the row's tensors it reads."""
    names = [layer.weight for layer in layers(graph) if re.fullmatch(row + r"\d", layer.name)]
    return [sorted(set(names), key=names.index).index(name) for name in names]


def test_orders(task):
    assert sharing(compress(task, Ties()).graph, r"up\.") == [0, 0, 0, 0]
    assert sharing(compress(task, Ties(count=2)).graph, r"up\.") == [0, 0, 1, 1]
    assert sharing(compress(task, Ties(count=2, order="cycle")).graph, r"down\.") == [0, 1, 0, 1]
    assert sharing(compress(task, Ties(count=3)).graph, r"up\.") == [0, 0, 1, 2]
    assert sharing(compress(task, Ties(groups=("up.[12]",))).graph, r"up\.") == [0, 1, 1, 2]


def test_parameters_are_as_many_times_fewer(task):
    record = compress(task, Ties(own=False)).records[0]
    stem_and_head = 6 * 16 + 16 + 16 * 3 + 3
    assert record.parameters[0] - stem_and_head == 4 * (record.parameters[1] - stem_and_head)
    assert record.skipped == dict.fromkeys(("stem", "head"), "there is no other in its row to share with")


@pytest.mark.parametrize("start", ["first", "last", "mean"])
def test_what_a_shared_tensor_is_at_first(task, start):
    weights = torch.stack([task.original.tensor(f"up.{index}.weight") for index in range(4)])
    expected = {"first": weights[0], "last": weights[-1], "mean": weights.mean(0)}[start]
    torch.testing.assert_close(compress(task, Ties(start=start)).graph.tensor("up.0.weight").detach(), expected)


def test_a_difference_of_full_rank_gives_the_original_back(task):
    for scales in (False, True):
        graph = compress(task, Ties(rank=16, start="mean", scales=scales)).graph
        torch.testing.assert_close(graph(task.example), task.original(task.example), rtol=1e-4, atol=1e-5)
    off = [float((compress(task, Ties(rank=r)).graph(task.example) - task.original(task.example)).detach().norm()) for r in (0, 8, 15)]
    assert off[2] < off[0]


def alike() -> Task:
    """Four layers, the first and the third alike, and the others."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    model[2].weight.data = 1.01 * model[0].weight.data
    model[3].weight.data = model[1].weight.data + 0.01
    return Task(model.eval(), torch.randn(4, 8))


def test_similar_layers_are_found():
    task = alike()
    assert sharing(compress(task, Ties(count=2, order="similar")).graph, "") == [0, 1, 0, 1]
    # the means of {0, 1} and {9, 10} are nearer to 5 by 4.5, but a pair moves twice as much: 1/2 + 1/2, then 2/3 * 20.25
    assert similar(torch.tensor([[0.0], [9.0], [1.0], [10.0], [5.0]]), 3) == [0, 1, 0, 1, 4]
    assert similar(torch.tensor([[0.0], [9.0], [1.0], [10.0], [5.1]]), 2) == [0, 1, 0, 1, 1]


def test_scales_are_those_of_least_squares_and_make_good_what_is_proportional():
    task, x = alike(), torch.randn(5, 8)
    task.model[2].weight.data *= torch.linspace(-1, 2, 8)[:, None]
    task = Task(task.model, task.example)
    tied = compress(task, Ties(groups=("[02]",), scales=True)).graph
    torch.testing.assert_close(tied(x), task.original(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tied.tensor("2.own_scale").detach(), 1.01 * torch.linspace(-1, 2, 8))
    convolutions = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    convolutions[2].weight.data = convolutions[0].weight.data * torch.tensor([1.0, -2.0, 0.5, 3.0]).reshape(4, 1, 1, 1)
    task = Task(convolutions.eval(), torch.randn(2, 4, 6, 6))
    torch.testing.assert_close(compress(task, Ties(scales=True)).graph(task.example), task.original(task.example), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"count": 2, "order": "cycle", "own": False}, {"rank": 2}, {"rank": 2, "scales": True}, {"scales": True, "own": False}],
    ids=str,
)
def test_ties_stay_through_training_the_file_and_onnx(task, tmp_path, options):
    result = compress(task, [Ties(**options), Logits(epochs=2.0)])
    before = sharing(compress(task, Ties(**options)).graph, r"up\.")
    multum.save(result, tmp_path / "model.mip", task)
    loaded = multum.load(tmp_path / "model.mip")
    assert sharing(loaded, r"up\.")[: len(before)] == before
    assert torch.equal(loaded(task.example), result.graph(task.example))
    content = to_onnx_bytes(result.graph)
    large = [one for one in onnx.load_from_string(content).graph.initializer if len(one.dims) == 2 and one.dims[0] * one.dims[1] == 512]
    assert len(large) == 2 * (max(before) + 1)
    multum.export(result.graph, tmp_path / "model.onnx")


def test_tied_layers_are_quantized_together(task):
    for step in (WeightOnly(bits=4), Static()):
        graph = compress(task, [Ties(), step]).graph
        assert sharing(graph, r"up\.") == [0, 0, 0, 0]


def test_training_gains(task):
    def off(*steps):
        ours, theirs = (graph(task.train[0][0]).detach().softmax(1) for graph in (compress(task, list(steps)).graph, task.original))
        return float((ours - theirs).square().mean())

    assert off(Ties(), Logits(epochs=40.0, learning_rate=0.01, patience=0)) < 0.3 * off(Ties())


def test_layers_of_unequal_shape_are_refused(task):
    with pytest.raises(StepError, match="unequal shape"):
        compress(task, Ties(groups=("*.1",)))
    with pytest.raises(StepError, match="change nothing"):
        compress(task, Ties(include=("stem", "head")))


@pytest.mark.parametrize("options", [{"count": 0}, {"rank": -1}, {"order": "random"}, {"start": "zero"}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(StepError):
        Ties(**options)
