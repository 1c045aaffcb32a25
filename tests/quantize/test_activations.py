"""Activation functions with few values."""

import pytest
import torch
from torch import nn

from multum.errors import StepError
from multum.export import to_onnx_bytes, verify
from multum.quantize import Activations, Static, WeightOnly
from multum.step import compress
from multum.task import Task

X = torch.tensor([[-9.0, -1.0, -0.2, 0.1, 0.6, 2.0, 9.0]])


def task(*modules: nn.Module) -> Task:
    return Task(nn.Sequential(*modules), X, calibration=[(X, 0)])


def after(step: Activations, *modules: nn.Module) -> list[float]:
    with torch.no_grad():
        return compress(task(*modules), step).graph(X)[0].tolist()


def test_one_bit_makes_a_sigmoid_a_step() -> None:
    assert after(Activations(bits=1), nn.Sigmoid()) == [0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("bits", [1, 2])
def test_two_bits_make_a_tanh_three_values(bits: int) -> None:
    assert after(Activations(bits=bits), nn.Tanh()) == [-1, -1, 0, 0, 1, 1, 1]  # tanh(0.6) is 0.54


def test_values_are_evenly_spaced_and_the_nearest() -> None:
    assert after(Activations(bits=2), nn.Sigmoid()) == pytest.approx(
        [0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1]
    )  # of 0, .27, .45, .52, .65, .88, 1
    assert after(Activations(bits=3), nn.Tanh()) == pytest.approx([-1, -2 / 3, -1 / 3, 0, 2 / 3, 1, 1])  # of -1, -.76, -.2, .1, .54, .96, 1


def test_forms_in_pieces() -> None:
    assert after(Activations(bits=8, hard=True), nn.Sigmoid()) == pytest.approx([0, 1 / 3, 0.4667, 0.5167, 0.6, 0.8333, 1], abs=1 / 510)
    assert after(Activations(bits=8, hard=True), nn.Tanh()) == pytest.approx([-1, -1, -0.2, 0.1, 0.6, 1, 1], abs=1 / 254)
    assert after(Activations(hard=True), nn.SiLU()) == pytest.approx([x * min(max(x / 6 + 0.5, 0), 1) for x in X[0].tolist()], abs=1e-6)


def test_gradients_pass_straight_through() -> None:
    graph = compress(task(nn.Linear(7, 3), nn.Sigmoid()), Activations(bits=1)).graph.requires_grad_(True).train()
    graph(X).sum().backward()
    assert graph.tensor("0.weight").grad.abs().sum() > 0


def test_what_is_not_changed_has_a_reason() -> None:
    made = task(nn.Sigmoid(), nn.GELU(), nn.ReLU6(), nn.Tanh())
    plan = Activations(exclude="3").plan(made.original.copy(), made)
    assert [change["where"] for change in plan.changes.values()] == ["0"]
    assert sorted(plan.skipped.values()) == ["excluded by name"] + [
        "its outputs have no bound that is always the same; quantize.Static measures one"
    ] * (len(plan.skipped) - 1)
    lacking = task(nn.Linear(7, 3))
    assert list(Activations().plan(lacking.original.copy(), lacking).skipped) == ["*"]


def test_it_goes_with_integer_weights_and_activations_and_into_a_file() -> None:
    made = task(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 4), nn.Sigmoid())
    for steps in ([WeightOnly(), Activations(bits=4)], [Static(), Activations(bits=4)]):
        graph = compress(made, steps).graph
        assert verify(graph, to_onnx_bytes(graph), [X, -X]).cosine > 0.999
    with pytest.raises(StepError, match="quantized already"):
        compress(made, [Activations(), Static()])


def test_bad_options_and_patterns_are_refused() -> None:
    for bits in (0, 9):
        with pytest.raises(StepError, match="1 to 8"):
            Activations(bits=bits)
    with pytest.raises(StepError, match="matches no smooth activation function"):
        compress(task(nn.Sigmoid()), Activations(include="gate*"))
