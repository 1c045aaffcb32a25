"""Uneven grids and fixed-point numbers, against numbers worked by hand, and the steps that use them."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import multum
from multum.errors import StepError
from multum.graph import layers
from multum.graph.file import to_data
from multum.quantize import FixedPoint, NonUniform, Static, WeightOnly
from multum.quantize.grid import best_scale, quantize, signed
from multum.quantize.uneven import FIXED, GRIDS, additive, fitted, fixed_point, integers, nearest, normal, power_scale, powers, quantiles
from multum.step import compress
from multum.task import Task

NF4 = [
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
]  # fmt: skip


def t(*values: float) -> Tensor:
    return torch.tensor(values)


def test_normal_quantiles_of_four_bits_are_nf4() -> None:
    assert normal(4).tolist() == pytest.approx(NF4, abs=1e-6)


def test_powers_of_two() -> None:
    assert powers(3).tolist() == [-1, -0.5, -0.25, 0, 0.25, 0.5, 1]
    assert powers(2).tolist() == [-1, 0, 1]


def test_additive_powers_of_two() -> None:
    # Four bits of magnitude: {0, 1, 1/4, 1/16} + {0, 1/2, 1/8, 1/32}, sixteen sums, the largest of them 3/2.
    first, second = (0, 1, 1 / 4, 1 / 16), (0, 1 / 2, 1 / 8, 1 / 32)
    expected = sorted({(a + b) / 1.5 for a in first for b in second})
    assert additive(5)[15:].tolist() == pytest.approx(expected)
    assert additive(5)[:15].tolist() == pytest.approx([-v for v in expected[:0:-1]])
    assert additive(3).tolist() == powers(3).tolist()
    # Three bits of magnitude: {0, 1, 1/4, 1/16} + {0, 1/2}.
    assert additive(4)[7:].tolist() == pytest.approx(sorted((a + b) / 1.5 for a in first for b in (0, 1 / 2)))


def test_each_quantile_stands_for_as_many_weights() -> None:
    x = torch.randn(40_000, generator=torch.Generator().manual_seed(0)) ** 3
    grid = quantiles(x, 3)
    assert len(grid) == 8
    assert 0.0 in grid
    counts = torch.unique(nearest(x / x[x.abs() < 50].abs().max(), grid * 0 + grid), return_counts=True)[1]
    assert counts.sum() == len(x)
    even = torch.quantile(x, (torch.arange(8) + 0.5) / 8)
    assert (grid * even.abs().max() - even).abs().max() == pytest.approx(float(even.abs().min()))  # only the one next to zero has moved


def test_nearest_by_hand() -> None:
    assert nearest(t(-2, -0.7, -0.1, 0.12, 0.4, 9), powers(3)).tolist() == [-1, -0.5, 0, 0, 0.5, 1]


@pytest.mark.parametrize("name", FIXED)
def test_grids_survive_as_integers(name: str) -> None:
    for bits in (2, 3, 4):
        grid = FIXED[name](bits)
        codes = integers(grid)
        assert len(codes) == len(grid)
        assert (codes / 127 - grid).abs().max() <= 0.5 / 127
        assert codes[0] == -codes[-1] == -127
        assert 0 in codes


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(GRIDS), st.sampled_from([2, 3, 4]))
def test_no_other_entry_is_nearer_and_no_tried_scale_is_better(seed: int, name: str, bits: int) -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(seed))
    codes = integers(FIXED[name](bits) if name in FIXED else quantiles(x, bits))
    scale = fitted(x, codes, 0)[:, None]
    found = scale * nearest(x / scale, codes)
    assert torch.allclose((found - x).abs(), (scale[..., None] * codes - x[..., None]).abs().amin(-1), atol=1e-6)
    whole = x.abs().amax(1, keepdim=True) / 127
    assert (found - x).square().sum() <= (whole * nearest(x / whole, codes) - x).square().sum() + 1e-6


def test_bell_shaped_weights_lose_less_on_normal_quantiles() -> None:
    # Weights that fill their range, as in blocks of a few hundred; with longer tails both clip.
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    full = (x.abs().amax(1) / 127)[:, None]
    uneven = (full * nearest(x / full, integers(normal(4))) - x).square().sum()
    even = (quantize(x, x.abs().amax(1) / 7, torch.zeros(64), signed(4, 0)) - x).square().sum()
    assert uneven < 0.8 * even
    assert best_scale(x, signed(4, 0)).shape == fitted(x, integers(normal(4)), 0).shape


def test_fixed_point_by_hand() -> None:
    x, step, grid = t(0.3, -0.3, 0.8, 9.0, -9.0), torch.tensor(0.25), signed(3)
    assert fixed_point(x, step, grid, "nearest").tolist() == [0.25, -0.25, 0.75, 0.75, -0.75]
    assert fixed_point(x, step, grid, "truncate").tolist() == [0.25, -0.5, 0.75, 0.75, -0.75]
    assert power_scale(t(0.9, -0.2), signed(3)).tolist() == 0.5  # 0.25 would clip 0.9
    assert power_scale(t(0.75), signed(3)).tolist() == 0.25


def test_stochastic_rounding_is_right_on_average() -> None:
    x, random = torch.full((20_000,), 0.3), torch.Generator().manual_seed(0)
    found = fixed_point(x, torch.tensor(1.0), signed(3), "stochastic", random)
    assert set(found.tolist()) == {0.0, 1.0}
    assert float(found.mean()) == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 20_000))


def task() -> Task:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    return Task(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)), x, calibration=[(x, torch.zeros(4))])


@pytest.mark.parametrize("step", [*(NonUniform(grid=grid, bits=3) for grid in GRIDS), FixedPoint(bits=4, rounding="stochastic")], ids=str)
def test_weights_lie_on_the_grid_in_the_file_and_after_static(step: multum.Step, tmp_path: Path) -> None:
    made = task()
    result = compress(made, [step, Static(bias_correction=False)])
    _, tensors = to_data(result.graph)
    for name in ("0.weight", "3.weight"):
        assert tensors[name].dtype == torch.int8
        values = tensors[name].unique().tolist()
        assert 0 in values
        assert len(values) <= (8 if isinstance(step, NonUniform) else 15)
        scale = tensors[f"{name}_scale"]
        if isinstance(step, FixedPoint):
            assert torch.equal(torch.log2(scale), torch.log2(scale).round())
        elif step.grid != "quantile":
            assert set(values) <= set(integers(FIXED[step.grid](3)).tolist())
    multum.save(result, tmp_path / "m.mip", made)
    with torch.no_grad():
        assert torch.equal(multum.load(tmp_path / "m.mip")(made.example), result.graph(made.example))


def test_the_error_is_reported_and_falls_with_bits() -> None:
    errors = [compress(task(), NonUniform(bits=bits)).records[0].measured["errors"]["0"] for bits in (2, 3, 4, 5)]
    assert errors == sorted(errors, reverse=True)
    assert 0 < errors[-1] < 0.01


def test_quantized_layers_are_left_and_bad_options_refused() -> None:
    result = compress(task(), [WeightOnly(exclude="3"), NonUniform()])
    assert result.records[1].skipped == {"0": "its weight is quantized already"}
    assert all(layer.quantizer() is not None for layer in layers(result.graph))
    for wrong, expected in (
        ({"grid": "even"}, "normal, power, additive, quantile"),
        ({"bits": 7}, "2 to 6 bits"),
        ({"grid": "power", "bits": 5}, "2 to 4"),
    ):
        with pytest.raises(StepError, match=expected):
            NonUniform(**wrong)
    with pytest.raises(StepError, match="nearest, truncate, stochastic"):
        FixedPoint(rounding="up")
    with pytest.raises(StepError, match="2 to 8"):
        FixedPoint(bits=1)
