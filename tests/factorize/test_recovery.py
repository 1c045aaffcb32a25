"""Chains that make good what those before them lost: nearer on data not seen, never worse, at the same ranks, in a graph as before."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

import multum
from multum import Task, compress
from multum.factorize import CP, SVD, Spatial, TensorTrain, Tucker
from multum.graph import layers
from multum.lighten import Replace
from multum.prune import recover as recover_
from multum.prune.deviation import Deviation
from multum.prune.recover import refittable


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(4, 16, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1, bias=place % 2 == 0) for place in range(5))
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(5))
        self.head = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = torch.relu(norm(block(x)))
        return self.head(x.mean((2, 3)))


def images(seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return nn.functional.avg_pool2d(torch.randn(24, 4, 12, 12, generator=random), 3, 1) * 3


@pytest.fixture(scope="module")
def task() -> Task:
    model = Deep().train()
    with torch.no_grad():
        for seed in range(60):
            model(images(seed))
    data = [(images(seed), torch.zeros(24)) for seed in range(4)]
    return Task(model.eval(), images(0)[:2], calibration=data)


@pytest.mark.parametrize("step", [SVD, Spatial, Tucker, CP])
@pytest.mark.parametrize("weighting", ["inputs", "outputs"])
def test_the_outputs_come_nearer_on_data_that_were_not_seen(step, weighting, task, tmp_path):
    plain, made = (compress(task, step(macs=0.5, weighting=weighting, recover=recover)) for recover in (False, True))
    assert made.records[0].changes == plain.records[0].changes
    assert made.records[0].measured["recovery"] == "least squares"
    assert plain.records[0].measured == {}
    off = Deviation(task.original, [images(100), images(101)])
    assert off(made.graph) < 0.6 * off(plain.graph)
    assert sorted(value.shape for _, value in made.graph.named_tensors()) == sorted(v.shape for _, v in plain.graph.named_tensors())
    multum.save(made, tmp_path / "model.mip", task)
    assert torch.equal(multum.load(tmp_path / "model.mip")(images(2)), made.graph(images(2)))


def test_the_original_stays_as_it_was(task):
    before = {name: value.clone() for name, value in task.original.named_tensors()}
    compress(task, SVD(macs=0.5))
    assert all(torch.equal(value, before[name]) for name, value in task.original.named_tensors())


def test_without_data_or_asked_not_to_nothing_is_fitted(task):
    assert compress(task, SVD(macs=0.5, samples=0)).records[0].measured == {}
    assert compress(Task(task.model, task.example), SVD(macs=0.5)).records[0].measured == {}
    assert compress(task, TensorTrain(parameters=0.9)).records[0].measured == {}


def test_what_is_worse_is_undone(task, monkeypatch):
    monkeypatch.setattr("multum.prune.recover.least_squares", lambda matrix, errors: 3 * matrix.flip(1))
    monkeypatch.setattr("multum.prune.recover._unchanged", lambda matrix, errors: 3 * matrix.flip(1))
    made, plain = (compress(task, SVD(macs=0.5, exclude="blocks.*", recover=recover)) for recover in (True, False))
    assert made.records[0].measured["recovery"] == "none"
    assert torch.equal(made.graph(images(2)), plain.graph(images(2)))


@pytest.mark.parametrize(
    "step", [SVD(macs=0.5, include="a"), Replace(by="grouped", include="a"), Replace(by="grouped", include="a", recover=False)]
)
def test_another_layer_that_reads_the_same_bias_keeps_it(step):
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(a=nn.Conv2d(16, 16, 3), relu=nn.ReLU(), b=nn.Conv2d(16, 16, 3))).eval()
    model.b.bias = model.a.bias
    batches = [(torch.randn(16, 16, 8, 8) + 1, torch.zeros(16)) for _ in range(4)]
    task = Task(model, batches[0][0][:2], calibration=batches)
    assert not refittable(task.original)
    graph = compress(task, step).graph
    (layer,) = (layer for layer in layers(graph) if layer.name == "b")
    assert torch.equal(graph.tensor(layer.bias), model.b.bias)


def test_a_table_alone_is_not_fitted_and_says_so_after_one_pass(monkeypatch):
    passes, one = list[int](), recover_.recover
    monkeypatch.setattr(recover_, "recover", lambda *given: passes.append(1) or one(*given))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 24), nn.Linear(24, 4)).eval()
    ids = [(torch.randint(0, 40, (16, 6)), torch.zeros(16)) for _ in range(4)]
    result = compress(Task(model, ids[0][0][:2], calibration=ids), SVD(rank=6, include="0"))
    assert len(passes) == 1
    assert result.records[0].measured["recovery"] == "none"
