"""Distillation of hidden values: the losses by hand, which values pair, and that the terms teach."""

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from multum import Recipe, Task, capture, compress
from multum.distill import Attention, Hidden, Logits, Relations, losses
from multum.distill.places import pairs
from multum.errors import StepError
from multum.prune import Channels


class Network(nn.Module):
    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.body = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for layer in self.body:
            x = x + torch.relu(layer(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def task() -> Task:
    torch.manual_seed(1)
    data = [(torch.randn(16, 1, 6, 6), torch.randint(0, 4, (16,))) for _ in range(12)]
    return Task(Network(), data[0][0], train=data, loss=nn.functional.cross_entropy)


def test_decoupled_is_soft_labels_when_the_weights_are_those_of_the_paper() -> None:
    # equation 6: KL = target part + (1 - p of the label) * part of the others, of one sample
    student, teacher = torch.tensor([[0.3, -1.0, 2.0]]), torch.tensor([[1.0, 0.5, -0.5]])
    rest = 1 - float(torch.softmax(teacher, 1)[0, 1])
    found = losses.decoupled(student, teacher, torch.tensor([1]), 1.0, 1.0, rest)
    assert found.item() == pytest.approx(losses.soft_labels(student, teacher, 1.0).item(), rel=1e-4)


def test_correlation_is_one_for_linear_maps() -> None:
    teacher = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]]).log()
    assert losses.correlated(teacher, teacher).item() == pytest.approx(0, abs=1e-6)
    assert losses.correlated(-teacher, teacher).item() > 1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_standardized_logits_know_neither_scale_nor_shift(seed: int, scale: float, shift: float) -> None:
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(losses.standardized(scale * logits + shift), losses.standardized(logits), rtol=1e-3, atol=1e-3)


def test_any_linear_map_of_the_teacher_is_as_good_as_the_teacher() -> None:
    torch.manual_seed(0)
    teacher = torch.randn(8, 6, 5, 5)
    student = torch.einsum("nchw,cd->ndhw", teacher, torch.randn(6, 9)) + 3
    assert losses.projected(student, teacher).item() < 1e-2
    assert losses.projected(torch.randn(8, 3, 5, 5), teacher).item() == pytest.approx(1, abs=0.05)  # knows nothing: all of the variance


def test_the_gradient_of_the_projected_error_is_right() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(64, 3, dtype=torch.float32), torch.randn(64, 2, requires_grad=True)
    losses.projected(student, teacher).backward()
    assert student.grad is not None
    other = student.detach().clone()
    other[5, 1] += 1e-2
    slope = (losses.projected(other, teacher) - losses.projected(student.detach(), teacher)) / 1e-2
    assert slope.item() == pytest.approx(student.grad[5, 1].item(), rel=0.15, abs=1e-4)


def test_attention_maps_by_hand() -> None:
    student, teacher = torch.zeros(1, 2, 1, 2), torch.zeros(1, 3, 1, 2)
    student[0, :, 0, 0], teacher[0, :, 0, 1] = 1.0, 2.0  # all energy left; all energy right: unit vectors at a right angle
    assert losses.attention(student, teacher).item() == pytest.approx(2.0)
    assert losses.attention(5 * student, student).item() == pytest.approx(0.0, abs=1e-7)


def test_relations_by_hand() -> None:
    line, wide = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.0, 0.0], [10.0, 0.0], [30.0, 0.0]])
    for loss in (losses.distances, losses.angles):
        assert loss(line, wide).item() == pytest.approx(0, abs=1e-6)  # the same but for size
    bent = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 2.0]])
    # distances 1, 2, sqrt 5 against 1, 2, 3; each relative to the mean of its own; twice each of three, of nine
    ours, theirs = [1, 2, math.sqrt(5)], [1, 2, 3]
    apart = [3 * a / sum(ours) - 3 * b / sum(theirs) for a, b in zip(ours, theirs, strict=True)]
    assert losses.distances(bent, line).item() == pytest.approx(sum(a * a for a in apart) / 9, rel=1e-4)
    assert losses.similarities(wide, line).item() == pytest.approx(0, abs=1e-6)
    assert losses.angles(bent, line).item() > 0.01


def test_relations_of_positions_and_contrast_and_flow() -> None:
    torch.manual_seed(0)
    value = torch.randn(2, 5, 8)
    assert losses.self_relations(value, value, 2).item() == pytest.approx(0, abs=1e-6)
    assert losses.self_relations(torch.randn(2, 5, 4), value, 2).item() > 0
    samples = torch.randn(12, 7)
    assert losses.contrast(3 * samples, samples).item() < losses.contrast(samples.roll(1, 0), samples).item() - 0.5
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 6, 2, 2)
    assert losses.flow((a, a), (b, b)).item() == pytest.approx(0, abs=1e-7)
    assert losses.patient(2 * value, value).item() == pytest.approx(0, abs=1e-6)


def test_values_pair_by_name_where_the_student_is_the_original_made_smaller(task: Task) -> None:
    student = compress(task, Channels(ratio=0.5)).graph
    found = pairs(student, task.original)
    assert [one.name for one, _ in found] == [other.name for _, other in found]
    assert len(found) == 3  # the ends of the blocks


def test_values_pair_by_depth_where_it_is_another_network(task: Task) -> None:
    student = capture(Network(8, 1), task.example)
    ((one, other),) = pairs(student, task.original, ())
    assert other.name == pairs(task.original, task.original)[-1][0].name
    assert one.meta["val"].shape[2:] == other.meta["val"].shape[2:]


def test_pairs_can_be_named(task: Task) -> None:
    found = pairs(task.original, task.original, ("body.*", "stem=body.2"))
    assert len(found) == 4
    assert found[3][1] is found[2][0]
    for pattern, said in (("bdy.*", "body.0"), ("stem=bodi.1", "body.1")):
        with pytest.raises(StepError, match=said):
            pairs(task.original, task.original, (pattern,))
    with pytest.raises(StepError, match="as many positions"):
        pairs(task.original, task.original, ("stem=head",))


@pytest.mark.parametrize(
    "step", [Hidden(), Hidden(loss="attention"), Relations(), Relations(loss="similarity"), Relations(loss="contrast")], ids=str
)
def test_the_hidden_values_are_learned(task: Task, step: Any) -> None:
    how = {"epochs": 4, "learning_rate": 2e-3, "weight": 5.0}
    recipes = [
        Recipe([Channels(ratio=0.5, recover=False), taught])
        for taught in (Logits(epochs=4, learning_rate=2e-3), type(step)(**how, loss=step.loss))
    ]
    plain, taught = (compress(task, recipe).graph for recipe in recipes)

    def apart(graph: Any) -> float:
        found = step.pairs(graph, task.original)
        total = 0.0
        graph.tap([one for one, _ in found])
        task.original.tap([other for _, other in found])
        with torch.no_grad():
            for inputs, _ in task.data("train"):
                graph(inputs)
                task.original(inputs)
                total += sum(float(step.compare(graph)(a, b)) for a, b in zip(graph.tapped, task.original.tapped, strict=True))
        graph.tap()
        task.original.tap()
        return total

    before = task.original.fingerprint()
    assert apart(taught) < apart(plain)
    assert task.original.fingerprint() == before
    assert not taught.tapped


def test_plans_are_data_and_say_what_pairs(task: Task) -> None:
    plan = Hidden().plan(task.original, task)
    assert json.loads(json.dumps(plan.changes)) == plan.changes
    assert len(plan.changes["*"]["pairs"]) == 3


@pytest.mark.parametrize("step", [Hidden(loss="hidden"), Relations(loss="rdk"), Hidden(weight=0.0), Attention()], ids=str)
def test_what_cannot_be_is_refused(task: Task, step: Any) -> None:
    with pytest.raises(StepError, match="Expected"):
        compress(task, step)


class Signal(nn.Sequential):
    def __init__(self, width: int) -> None:
        torch.manual_seed(0)
        layers = [nn.Conv1d(3, width, 3, padding=1), nn.BatchNorm1d(width), nn.ReLU(), nn.Conv1d(width, width, 3, padding=1), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(width, 2))


@pytest.mark.parametrize("loss", ["projected", "attention"])
def test_channels_of_signals_are_channels(loss: str) -> None:
    torch.manual_seed(0)
    data = [(torch.randn(8, 3, 20), torch.randint(0, 2, (8,))) for _ in range(4)]
    task = Task(Signal(16), data[0][0], train=data)
    student = capture(Signal(4), data[0][0])
    assert [(list(a.meta["val"].shape[1:]), list(b.meta["val"].shape[1:])) for a, b in pairs(student, task.original)] == [
        ([4, 20], [16, 20]),
        ([4, 20], [16, 20]),
    ]
    compress(task, Hidden(loss=loss), student=student)


def test_losses_combine_with_weights(task: Task) -> None:
    ours, theirs = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    found = Hidden(loss=("attention=100", "rkd=0.5", "projected")).compare(task.original)(ours, theirs)
    rkd = losses.distances(ours, theirs) + 2 * losses.angles(ours, theirs)
    expected = 100 * losses.attention(ours, theirs) + 0.5 * rkd + losses.projected(ours, theirs)
    torch.testing.assert_close(found, expected)
    for names, said in ((("rkd=x",), "gives no weight"), (("rdk",), "no loss 'rdk'"), (("rkd=0",), "No loss has a weight")):
        with pytest.raises(StepError, match=said):
            compress(task, Hidden(loss=names))
