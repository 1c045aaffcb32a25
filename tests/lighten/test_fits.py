"""The closed forms: exact where a layer has the form of the block, the optimum where that is known, nearer with data."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multum.graph.matrix import refitted
from multum.lighten.fits import FITS, Dense, lost

INPUTS, OUTPUTS, TAPS = 8, 12, 9


def moments(height: int, seed: int = 0) -> torch.Tensor:
    mix = torch.randn(height, height, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    return mix @ torch.diag(torch.logspace(0, -1.5, height, dtype=torch.double)) @ mix.T / height


def dense(matrix: torch.Tensor, second: torch.Tensor | None = None, window: tuple[int, ...] = (3, 3), **sizes) -> Dense:
    inputs = matrix.shape[1] // torch.Size(window).numel()
    return Dense(matrix, moments(matrix.shape[1]) if second is None else second, inputs, window, **sizes)


def random(*shape: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(*shape, dtype=torch.double)


def of_form(kind: str) -> Dense:
    """A layer that a block of this kind can be exactly."""
    torch.manual_seed(0)
    if kind in ("separable", "inverted"):
        return dense(torch.einsum("oc,ct->oct", random(OUTPUTS, INPUTS), random(INPUTS, TAPS)).flatten(1))
    if kind == "grouped":
        return dense(torch.block_diag(*(random(OUTPUTS // 4, INPUTS // 4 * TAPS) for _ in range(4))))
    if kind == "shuffled":  # rank 12 // 4 = 3 between two groups of inputs and of outputs
        return dense((random(OUTPUTS, 2 * 3) @ torch.block_diag(random(3, 36), random(3, 36))), groups=2)
    if kind == "ghost":
        kept = random(OUTPUTS // 2, INPUTS * TAPS)
        return dense(torch.cat([kept * torch.linspace(-1, 2, 6)[:, None], kept])[torch.randperm(OUTPUTS)])
    if kind == "bottleneck":
        core = torch.einsum("os,srt,ri->oit", random(OUTPUTS, 6), random(6, 4, TAPS), random(4, INPUTS))
        return dense(core.flatten(1))
    if kind == "low_rank":
        return dense(random(OUTPUTS, 6) @ random(6, INPUTS * TAPS))
    places = {"smaller": [6, 7, 8, 11, 12, 13, 16, 17, 18], "dilated": [0, 2, 4, 10, 12, 14, 20, 22, 24]}[kind]
    weight = torch.zeros(OUTPUTS, INPUTS, 25, dtype=torch.double)
    weight[:, :, places] = random(OUTPUTS, INPUTS, 9)
    return dense(weight.flatten(1), window=(5, 5))


@pytest.mark.parametrize("kind", FITS)
def test_a_layer_of_the_form_is_found_again(kind):
    layer = of_form(kind)
    parts, made = FITS[kind](layer)
    assert lost(layer, made) < 1e-6
    torch.testing.assert_close(made, layer.matrix, rtol=0, atol=2e-3 * float(layer.matrix.abs().max()))
    assert sum(part.weight.numel() for part in parts) < layer.matrix.numel()


@pytest.mark.parametrize("kind", FITS)
def test_data_bring_the_outputs_nearer_than_the_weights_alone(kind):
    sizes = {"window": (5, 5)} if kind in ("smaller", "dilated") else {}
    matrix = random(OUTPUTS, INPUTS * 25 if sizes else INPUTS * TAPS)
    seen = dense(matrix, **sizes)
    blind = FITS[kind](dense(matrix, torch.eye(matrix.shape[1], dtype=torch.double), **sizes))[1]
    assert lost(seen, FITS[kind](seen)[1]) < 0.97 * lost(seen, blind)


def test_what_is_lost_is_the_share_of_the_energy_of_the_outputs():
    layer = dense(torch.tensor([[3.0, 4.0]], dtype=torch.double), torch.diag(torch.tensor([1.0, 4.0], dtype=torch.double)), ())
    assert lost(layer, torch.tensor([[3.0, 2.0]], dtype=torch.double)) == pytest.approx(16 / 73)


def test_the_last_layer_is_least_squares():
    columns, matrix, features = random(6, 50), random(3, 6), random(2, 6)
    found = refitted(matrix, columns @ columns.T, features)
    expected = torch.linalg.lstsq((features @ columns).T, (matrix @ columns).T).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_rank_one_per_channel_without_data_is_the_singular_vector():
    matrix, unit = random(OUTPUTS, INPUTS * TAPS), torch.eye(INPUTS * TAPS, dtype=torch.double)
    made = FITS["separable"](dense(matrix, unit))[1].reshape(OUTPUTS, INPUTS, TAPS)
    for place in range(INPUTS):
        left, values, right = torch.linalg.svd(matrix.reshape(OUTPUTS, INPUTS, TAPS)[:, place])
        torch.testing.assert_close(made[:, place], values[0] * torch.outer(left[:, 0], right[0]), rtol=1e-3, atol=1e-4)


def test_more_filters_per_channel_lose_less_and_all_lose_nothing():
    losses = []
    for expansion in (1, 2, 4, TAPS):
        layer = dense(random(OUTPUTS, INPUTS * TAPS), expansion=expansion)
        losses.append(lost(layer, FITS["separable"](layer)[1]))
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 0.1
    assert losses[-1] < 1e-8


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), st.sampled_from(["separable", "grouped", "shuffled", "bottleneck", "low_rank"]))
def test_no_scale_of_the_block_is_better(seed, kind):
    torch.manual_seed(seed)
    layer = dense(torch.randn(OUTPUTS, INPUTS * TAPS, dtype=torch.double), moments(INPUTS * TAPS, seed), groups=2)
    made = FITS[kind](layer)[1]
    assert lost(layer, made) <= 1
    for other in (0.98 * made, 1.02 * made):
        assert lost(layer, made) <= lost(layer, other) + 1e-9
