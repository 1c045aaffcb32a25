"""Criteria, worked by hand."""

import pytest
import torch
from torch import Tensor, nn

from multum import Task
from multum.analyze import evidence as evidence_
from multum.analyze.evidence import Evidence
from multum.graph.axes import axes
from multum.graph.layers import layers
from multum.prune import obs as obs_
from multum.prune.scores import CRITERIA

FIRST = torch.tensor([[3.0, 4.0], [0.0, 5.0], [8.0, 6.0]])  # L2 5, 5, 10; L1 7, 5, 14
SECOND = torch.tensor([[1.0, 0.0, 0.0], [0.0, 3.0, -1.0], [0.0, 4.0, 1.0]])  # down the columns L2 1, 5, sqrt 2; L1 1, 7, 2


def scores(criterion: str, norm: list[float] | None = None) -> list[float]:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3) if norm else nn.ReLU(), nn.Linear(3, 3))
    with torch.no_grad():
        model[0].weight.copy_(FIRST)
        model[2].weight.copy_(SECOND)
        if norm:
            model[1].weight.copy_(torch.tensor(norm))
    return judged(criterion, Task(model, torch.zeros(2, 2)))


def judged(criterion: str, task: Task, group: str = "0:out", samples: int = 512) -> list[float]:
    groups = axes(task.original)
    return CRITERIA[criterion](Evidence(task.original, task, samples), groups, groups[group]).tolist()


def mean_one(values: list[float]) -> list[float]:
    return pytest.approx([value * len(values) / sum(values) for value in values])


def test_magnitude_is_what_makes_a_channel_times_what_reads_it() -> None:
    assert scores("magnitude") == mean_one([5 * 1, 5 * 5, 10 * 2**0.5])
    assert scores("magnitude_l1") == mean_one([7 * 1, 5 * 7, 14 * 2])


def test_the_scale_of_a_normalization_takes_the_place_of_what_makes_a_channel() -> None:
    assert scores("magnitude", [2.0, -0.5, 1.0]) == mean_one([2 * 1, 0.5 * 5, 1 * 2**0.5])
    assert scores("batch_norm", [2.0, -0.5, 1.0]) == mean_one([2, 0.5, 1])


def test_batch_norm_falls_back_on_magnitude() -> None:
    assert scores("batch_norm") == scores("magnitude")


def test_every_place_of_a_channel_counts() -> None:
    """A channel of a convolution that is flattened is read by one column for each pixel."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(8, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1))
        model[2].weight.copy_(torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 3.0, 4.0, 0.0]]))
    task = Task(model, torch.zeros(2, 1, 2, 2))
    assert judged("magnitude", task) == mean_one([1 * 2, 2 * 5])
    assert judged("magnitude_l1", task) == mean_one([1 * 4, 2 * 7])
    assert judged("batch_norm", task) == mean_one([1 * 2, 2 * 5])


def made(seed: int = 0, width: int = 6) -> Task:
    """A convolution whose channels two others read, one of them with a window."""
    torch.manual_seed(seed)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.wide, self.head = nn.Conv2d(2, width, 1), nn.Conv2d(width, 3, 3, bias=False), nn.Linear(width + 3, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            return self.head(torch.cat([x.mean((2, 3)), torch.relu(self.wide(x)).mean((2, 3))], 1))

    data = [(torch.randn(16, 2, 5, 5), torch.randint(0, 4, (16,))) for _ in range(2)]
    return Task(Two(), data[0][0], train=data, loss=nn.functional.cross_entropy)


def read(task: Task) -> tuple[Tensor, Tensor]:
    """What the window and the head read: columns [height, n] of both, of all samples."""
    x = torch.relu(task.model.stem(torch.cat([x for x, _ in task.train])))
    joined = torch.cat([x.mean((2, 3)), torch.relu(task.model.wide(x)).mean((2, 3))], 1)
    return nn.functional.unfold(x, 3).transpose(0, 1).flatten(1).double().detach(), joined.T.double().detach()


def test_channels_go_by_what_the_outputs_lose_when_the_others_make_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obs_, "_DAMP", 1e-6)
    task = made()
    losses = torch.zeros(6, dtype=torch.double)
    weights = (task.model.wide.weight.detach().flatten(1).double(), task.model.head.weight.detach().double())
    for weight, x in zip(weights, read(task), strict=True):
        x = x - x.mean(1, keepdim=True)
        y = weight @ x
        window = 9 if len(x) == 54 else 1
        for channel in range(6):
            kept = torch.ones(len(x), dtype=torch.bool)
            kept[channel * window : (channel + 1) * window] = False
            fitted = torch.linalg.lstsq(x[kept].T, y.T).solution.T @ x[kept]
            losses[channel] += (y - fitted).square().sum() / y.square().sum()
    found = judged("obs", task, "stem:out")
    assert torch.tensor(found).argmin() == losses.argmin()
    assert min(found) == pytest.approx(float(losses.min()), rel=1e-3)
    assert len(set(found)) == 6
    order = torch.tensor(found).argsort()
    assert (torch.tensor(found)[order].diff() > 0).all()


def test_a_copy_of_a_channel_costs_nothing_and_then_the_other_copy_does() -> None:
    task = made()
    with torch.no_grad():
        task.model.stem.weight[4], task.model.stem.bias[4] = task.model.stem.weight[1], task.model.stem.bias[1]
    found = judged("obs", Task(task.model, task.example, train=task.train), "stem:out")
    assert min(found[1], found[4]) < 0.02 < max(found[1], found[4])


def test_grams_are_held_within_bounds_and_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    task = made()
    known = {layer.name: layer for layer in layers(task.original)}
    wide, head = read(task)
    for limit in (1 << 29, 1):
        monkeypatch.setattr(evidence_, "GRAMS", limit)
        evidence = Evidence(task.original, task)
        for name, x in (("wide", wide), ("head", head)):
            x = x - x.mean(1, keepdim=True)
            torch.testing.assert_close(evidence.gram(known[name])[0], x @ x.T, rtol=1e-4, atol=1e-3)
            assert limit > 1 or list(evidence._grams) == [name]


def test_activations_are_those_that_the_next_layers_read() -> None:
    task = made()
    _, joined = read(task)
    planes = torch.relu(task.model.stem(torch.cat([x for x, _ in task.train]))).detach().double()
    assert judged("activation", task, "stem:out") == mean_one((planes.mean((0, 2, 3)) + joined[:6].mean(1)).tolist())
    assert judged("apoz", task, "stem:out") == mean_one(
        ((planes > 0).double().mean((0, 2, 3)) + (joined[:6] > 0).double().mean(1)).tolist()
    )


def test_single_weights_add_up_over_all_that_make_and_read_a_channel() -> None:
    task = made()
    model = task.model
    parts = (model.stem.weight.flatten(1), model.wide.weight.transpose(0, 1).flatten(1), model.head.weight[:, :6].T)
    joined = torch.cat(parts, 1).detach().double()
    assert judged("l1", task, "stem:out") == pytest.approx(joined.abs().sum(1).tolist())
    assert judged("l2", task, "stem:out") == pytest.approx(joined.square().sum(1).tolist())
    slopes = Evidence(task.original, task).gradients
    parts = (slopes["stem.weight"].flatten(1), slopes["wide.weight"].transpose(0, 1).flatten(1), slopes["head.weight"][:, :6].T)
    assert judged("gradient", task, "stem:out") == pytest.approx(torch.cat(parts, 1).double().norm(dim=1).tolist())


def test_filters_near_the_middle_of_the_others_score_low() -> None:
    task = made()
    filters = task.model.stem.weight.detach().flatten(1).double()
    wanted = torch.stack([(filters - own).norm(dim=1).sum() for own in filters])
    assert judged("fpgm", task, "stem:out") == mean_one(wanted.tolist())


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_judges_every_group_of_attention(criterion: str) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x).view(-1, 5, 4, 2).transpose(1, 2) for layer in (self.q, self.k, self.v))
            return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 5, 8)).mean(1)

    torch.manual_seed(0)
    x = torch.randn(8, 5, 8)
    task = Task(Attention(), x, train=[(x, torch.randint(0, 8, (8,)))], loss=nn.functional.cross_entropy)
    for group in axes(task.original):
        if not group.reason:
            found = torch.tensor(judged(criterion, task, group.name))
            assert found.shape == (group.size,)
            assert (found >= 0).all()
            assert torch.isfinite(found).all()
            assert criterion in ("apoz", "fpgm") or found.unique().numel() > 1
