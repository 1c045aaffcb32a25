"""The arithmetic of grids, against numbers worked by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from multum.quantize.grid import Grid, affine, best_scale, full_scale, largest, levels, quantize, signed, unsigned

numbers = st.floats(-1e4, 1e4, width=32)


def t(*values: float) -> Tensor:
    return torch.tensor(values)


def test_the_integers_of_a_grid() -> None:
    assert signed(8) == Grid(-127, 127, None)
    assert signed(2, 1) == Grid(-1, 1, 1)
    assert unsigned(8) == Grid(0, 255, None)
    assert unsigned(4) == Grid(0, 15, None)


def test_halves_go_to_the_even_integer() -> None:
    x, scale, zero = t(0.25, 0.75, 1.25, -0.25, -0.75), torch.tensor(0.5), torch.tensor(0.0)
    assert levels(x, scale, zero, signed(8)).tolist() == [0, 2, 2, 0, -2]
    assert quantize(x, scale, zero, signed(8)).tolist() == [0, 1, 1, 0, -1]


def test_numbers_beyond_the_grid_are_clipped() -> None:
    x = t(-100.0, -1.1, 3.2, 100.0)
    assert levels(x, torch.tensor(1.0), torch.tensor(0.0), signed(3)).tolist() == [-3, -1, 3, 3]
    assert quantize(x, torch.tensor(0.1), torch.tensor(10.0), unsigned(8)).tolist() == pytest.approx([-1, -1, 3.2, 24.5])


def test_a_scale_for_every_channel() -> None:
    x = torch.tensor([[1.0, -4.0], [30.0, 20.0]])
    assert largest(x, signed(8, 0)).tolist() == [4, 30]
    assert largest(x, signed(8, 1)).tolist() == [30, 20]
    assert largest(x, signed(8)).item() == 30
    scale = torch.tensor([1.0, 10.0])
    assert levels(x, scale, torch.zeros(2), signed(8, 0)).tolist() == [[1, -4], [3, 2]]
    assert levels(x, scale, torch.zeros(2), signed(8, 1)).tolist() == [[1, 0], [30, 2]]


def test_an_asymmetric_range_by_hand() -> None:
    scale, zero = affine(-1.0, 4.1, unsigned(8))
    assert scale == pytest.approx(0.02)  # 5.1 / 255
    assert zero == 50  # 1 / 0.02


@pytest.mark.parametrize(("low", "high", "expected"), [(1.0, 5.1, (0.02, 0)), (-5.1, -1.0, (0.02, 255)), (0.0, 0.0, (1e-12, 0))])
def test_a_range_is_widened_to_hold_zero(low: float, high: float, expected: tuple[float, int]) -> None:
    assert affine(low, high, unsigned(8)) == pytest.approx(expected)


def test_the_full_scale_clips_nothing_and_survives_zeros() -> None:
    x = torch.tensor([[2.54, -1.0], [0.0, 0.0]])
    assert full_scale(x, signed(8, 0)).tolist() == pytest.approx([0.02, 1e-12])
    assert torch.equal(quantize(x, full_scale(x, signed(8, 0)), torch.zeros(2), signed(8, 0))[1], x[1])


def test_the_best_scale_of_numbers_on_a_grid_is_that_grid_s() -> None:
    x = 0.3 * torch.tensor([[-7.0, 3.0, 1.0, 7.0], [2.0, 4.0, -6.0, 7.0]])
    scale = best_scale(x, signed(4, 0))
    assert scale.tolist() == pytest.approx([0.3, 0.3])


def test_the_best_scale_clips_an_outlier() -> None:
    x = torch.cat([torch.linspace(-1, 1, 1000), t(8.0)])  # keeping 8 would cost the others two of their three levels
    scale = best_scale(x, signed(2)).item()
    assert scale < 1.1  # full scale would be 8
    error = (quantize(x, torch.tensor(scale), torch.tensor(0.0), signed(2)) - x).square().sum()
    nearby = [(quantize(x, s, torch.tensor(0.0), signed(2)) - x).square().sum() for s in torch.linspace(0.1, 8, 800)]
    assert error <= 1.001 * min(nearby)


def test_the_best_scale_of_a_normal_weight_is_the_known_one() -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    # Max (1960), table II: the step of the best uniform quantizer with 15 levels for a normal variable is 0.3534.
    assert best_scale(x, signed(4)).item() == pytest.approx(0.3534, rel=0.02)


@settings(max_examples=60, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=30), st.integers(2, 8))
def test_inside_the_range_the_error_is_half_a_step(values: list[float], bits: int) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    grid = unsigned(bits)
    scale, zero = affine(min(values), max(values), grid)
    error = (quantize(x, torch.tensor(scale), torch.tensor(float(zero)), grid) - x).abs().max().item()
    assert error <= scale / 2 * (1 + 1e-9) + scale / 2  # the zero point is rounded too, by at most half a step
    full = full_scale(x, signed(bits))
    symmetric = (quantize(x, full, torch.zeros(()), signed(bits)) - x).abs().max()
    assert symmetric <= full / 2 * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=30), st.integers(2, 8))
def test_zero_is_exact_and_quantizing_again_changes_nothing(values: list[float], bits: int) -> None:
    grid = unsigned(bits)
    scale, zero = (torch.tensor(float(value)) for value in affine(min(values), max(values), grid))
    assert quantize(torch.zeros(1), scale, zero, grid).item() == 0
    once = quantize(torch.tensor(values), scale, zero, grid)
    assert torch.equal(quantize(once, scale, zero, grid), once)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.floats(-100, 100, width=32), min_size=5, max_size=5), min_size=1, max_size=4), st.integers(2, 8))
def test_the_best_scale_is_at_least_as_good_as_the_full_one(rows: list[list[float]], bits: int) -> None:
    x, grid = torch.tensor(rows), signed(bits, 0)

    def error(scale: Tensor) -> Tensor:
        return (quantize(x, scale, torch.zeros_like(scale), grid) - x).square().sum(1)

    assert (error(best_scale(x, grid)) <= error(full_scale(x, grid))).all()
