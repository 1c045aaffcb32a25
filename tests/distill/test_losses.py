"""Distillation losses against numbers worked by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from multum.errors import StepError
from multum.train.losses import cosine, imitation, soft_labels, squared_error

torch.set_num_threads(1)
LOG3 = math.log(3)


def test_soft_labels_by_hand() -> None:
    # teacher (3/4, 1/4), student (1/2, 1/2): KL = 3/4 ln(3/2) + 1/4 ln(1/2) = 3/4 ln 3 - ln 2
    teacher, student = torch.tensor([[LOG3, 0.0]]), torch.zeros(1, 2)
    expected = 0.75 * LOG3 - math.log(2)
    assert soft_labels(student, teacher, 1.0).item() == pytest.approx(expected, rel=1e-5)
    # at temperature 2 twice the logits give the same probabilities, and the square of 2 multiplies
    assert soft_labels(student, 2 * teacher, 2.0).item() == pytest.approx(4 * expected, rel=1e-5)
    # the mean over the batch: a second sample on which both agree halves it
    both = torch.cat([teacher, student]), torch.cat([student, student])
    assert soft_labels(both[1], both[0], 1.0).item() == pytest.approx(expected / 2, rel=1e-5)


def test_the_gradient_is_the_difference_of_probabilities_times_the_temperature() -> None:
    # d/dz T^2 KL = T (q - p): with p = (3/4, 1/4) and q = (1/2, 1/2) at T = 2: (-1/2, 1/2)
    student = torch.zeros(1, 2, requires_grad=True)
    soft_labels(student, torch.tensor([[2 * LOG3, 0.0]]), 2.0).backward()
    assert student.grad is not None
    assert student.grad.tolist()[0] == pytest.approx([-0.5, 0.5], rel=1e-5)


@given(st.lists(st.floats(-20, 20), min_size=3, max_size=3), st.lists(st.floats(-20, 20), min_size=3, max_size=3), st.floats(0.5, 20))
def test_soft_labels_are_zero_for_equals_and_never_negative(student: list[float], teacher: list[float], temperature: float) -> None:
    ours, theirs = torch.tensor([student]), torch.tensor([teacher])
    assert soft_labels(ours, theirs, temperature) >= -1e-4
    assert soft_labels(theirs + 3.0, theirs, temperature).abs() < 1e-3  # a constant added to all logits says nothing


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_zero_is_refused(temperature: float) -> None:
    with pytest.raises(StepError, match="temperature is"):
        soft_labels(torch.zeros(1, 2), torch.zeros(1, 2), temperature)


def test_squared_error_is_relative() -> None:
    teacher, student = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])  # error 1/2, mean square 25/2
    assert squared_error(student, teacher).item() == pytest.approx(1 / 25)
    assert squared_error(1000 * student, 1000 * teacher).item() == pytest.approx(1 / 25)
    assert squared_error(torch.zeros(2), torch.zeros(2)).item() == 0


def test_cosine_by_hand() -> None:
    teacher, student = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[5.0, 0.0], [1.0, 1.0]])
    assert cosine(student, teacher).item() == pytest.approx((0 + 1 - math.sqrt(0.5)) / 2)


STUDENT, TEACHER = torch.zeros(1, 2), torch.tensor([[LOG3, 0.0]])
KL, SQUARE = 0.75 * LOG3 - math.log(2), 1.0  # the student is zero: all of the teacher's square is missing


@pytest.mark.parametrize(
    ("place", "targets", "expected"),
    [
        (lambda x: x, torch.tensor([1]), KL),  # labels say that these are logits
        (lambda x: x, None, SQUARE),
        (lambda x: x, torch.zeros(1, 2), SQUARE),  # a regression
        (lambda x: {"logits": x}, None, KL),
        (lambda x: {"logits": x, "pooled": 3 * x}, None, KL + SQUARE),
        (lambda x: (x, torch.tensor([7])), {"labels": torch.tensor([0])}, KL),  # integers are no outputs to learn
        (lambda x: x[:, :, None, None].expand(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long), KL),  # segmentation
        (lambda x: x[:, None, :].expand(1, 5, 2), torch.zeros(1, 5, dtype=torch.long), KL),  # one label for each token
        (lambda x: x[:, None, :].expand(1, 5, 2), torch.zeros(1, dtype=torch.long), SQUARE),
    ],
)
def test_imitation_chooses_by_outputs_and_targets(place: object, targets: object, expected: float) -> None:
    assert imitation(place(STUDENT), place(TEACHER), targets, 1.0).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("student", "teacher", "both"),
    [
        (torch.zeros(2, 10), torch.zeros(2, 100), (r"\[2, 10\]", r"\[2, 100\]")),
        ({"logits": torch.zeros(2, 10)}, {"scores": torch.zeros(2, 10)}, (r"logits \[2, 10\]", r"scores \[2, 10\]")),
    ],
)
def test_different_outputs_are_named(student: object, teacher: object, both: tuple[str, str]) -> None:
    with pytest.raises(StepError, match=f"The student gives .*{both[0]}.*the teacher .*{both[1]}"):
        imitation(student, teacher, None, 1.0)


def test_outputs_without_floats_are_refused() -> None:
    value: Tensor = torch.tensor([1])
    with pytest.raises(StepError, match="no floating-point tensor"):
        imitation(value, value, None, 1.0)
