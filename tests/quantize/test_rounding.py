"""Rounding as energy minimisation: hand-worked energies, exact optima of small problems, and what no method may do."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from multum.errors import StepError
from multum.quantize.bound import certify, lower_bound
from multum.quantize.rounding import ROUNDINGS, Problem, anneal, descend, gptq, inverse_factor, nearest, sweep


def problem(inputs: int, rows: int = 4, alike: float = 0.9, high: float = 7, seed: int = 0) -> Problem:
    """Random rows that meet inputs of which neighbours have the correlation `alike`."""
    random = torch.Generator().manual_seed(seed)
    place = torch.arange(inputs)
    spread = torch.rand(inputs, generator=random) + 0.2
    H = alike ** (place[:, None] - place).abs() * spread[:, None] * spread
    w = torch.randn(1, rows, inputs, generator=random)
    s = (w.abs().amax(-1, keepdim=True) / high).expand_as(w)
    return Problem(w, s, H[None], torch.full_like(w, -high), torch.full_like(w, high))


def optimum(two: Problem) -> Tensor:
    """The least energy of each row over all choices of z."""
    choices = itertools.product((0.0, 1.0), repeat=two.w.shape[-1])
    return torch.stack([two.energy(torch.minimum(two.low + torch.tensor(z), two.high)) for z in choices]).amin(0)


def by_hand() -> Problem:
    w = torch.tensor([[[0.4, 0.3]]])
    return Problem(w, torch.ones_like(w), torch.tensor([[[1.0, 0.9], [0.9, 1.0]]]), torch.full_like(w, -7), torch.full_like(w, 7))


def test_the_energy_by_hand() -> None:
    hand = by_hand()
    assert hand.energy(torch.tensor([[[0.0, 0.0]]])).item() == pytest.approx(0.16 + 0.09 + 2 * 0.9 * 0.12)
    assert hand.energy(torch.tensor([[[1.0, 0.0]]])).item() == pytest.approx(0.36 + 0.09 - 2 * 0.9 * 0.18)


@pytest.mark.parametrize("method", ["gptq", "adaround", "energy"])
def test_of_two_that_go_together_one_is_rounded_up(method: str) -> None:
    assert nearest(by_hand()).flatten().tolist() == [0, 0]
    assert sorted(ROUNDINGS[method](by_hand()).flatten().tolist()) == [0, 1]


def test_gptq_makes_up_for_each_error_by_what_is_still_free() -> None:
    given_ = problem(6, rows=3)
    order = given_.H[0].diagonal().argsort(descending=True)
    expected = given_.w[0].clone()
    for step, j in enumerate(order):
        rest = order[step + 1 :]
        level = torch.round(expected[:, j] / given_.s[0, :, j])
        error = given_.s[0, :, j] * level - expected[:, j]
        if len(rest):  # the real weights that are best for the rest, now that this one is off by `error`
            expected[:, rest] -= error[:, None] * torch.linalg.solve(given_.H[0][rest][:, rest], given_.H[0][rest, j])
        expected[:, j] += error
    assert torch.equal(gptq(given_)[0], (expected / given_.s[0]).round())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.floats(0, 0.99), st.integers(1, 8), st.integers(0, 10**6))
def test_annealing_is_never_worse_and_stays_on_the_grid(inputs: int, alike: float, high: int, seed: int) -> None:
    given_ = problem(inputs, 3, alike, high, seed)
    found = anneal(given_, 4)
    assert torch.equal(found, found.round())
    assert bool((found.abs() <= high).all())
    for other in (nearest(given_), gptq(given_), descend(given_, gptq(given_))):
        assert bool((given_.energy(found) <= given_.energy(other) * (1 + 1e-4) + 1e-6).all())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 150), st.floats(0, 0.99), st.integers(0, 10**6))
def test_a_sweep_never_adds_energy(inputs: int, alike: float, seed: int) -> None:
    given_ = problem(inputs, 3, alike, seed=seed)
    q = torch.randint(-7, 8, given_.w.shape, generator=torch.Generator().manual_seed(seed)).float()
    assert bool((given_.energy(sweep(given_, q)) <= given_.energy(q) * (1 + 1e-4)).all())


@pytest.mark.parametrize("alike", [0.3, 0.7, 0.9])
def test_small_problems_are_solved(alike: float) -> None:
    two = problem(10, rows=6, alike=alike).between()
    assert torch.allclose(two.energy(anneal(two)), optimum(two), rtol=1e-4)


@pytest.mark.parametrize("method", ROUNDINGS)
def test_between_means_one_of_the_two_neighbours(method: str) -> None:
    two = problem(20).between()
    found = ROUNDINGS[method](two)
    assert bool(((found == two.low) | (found == two.high)).all())


def test_methods_in_order() -> None:
    given_ = problem(96, rows=8)
    energies = {name: float(given_.energy(method(given_)).sum()) for name, method in ROUNDINGS.items()}
    assert energies["energy"] < energies["gptq"] < 0.7 * energies["nearest"]
    assert energies["energy"] < energies["adaround"] < 0.7 * energies["nearest"]


def test_a_row_does_not_depend_on_the_others_unless_it_draws() -> None:
    given_ = problem(30, rows=5)
    alone = Problem(given_.w[:, 2:3], given_.s[:, 2:3], given_.H, given_.low[:, 2:3], given_.high[:, 2:3])
    assert torch.equal(gptq(given_)[:, 2:3], gptq(alone))
    assert torch.equal(descend(given_, nearest(given_))[:, 2:3], descend(alone, nearest(alone)))


def test_groups_are_rounded_each_by_its_own_matrix() -> None:
    a, b = problem(12, seed=1), problem(12, alike=0.2, seed=2)
    both = Problem(*(torch.cat([getattr(part, name) for part in (a, b)]) for name in ("w", "s", "H", "low", "high")))
    assert torch.equal(gptq(both), torch.cat([gptq(a), gptq(b)]))
    assert torch.equal(descend(both, nearest(both)), torch.cat([descend(a, nearest(a)), descend(b, nearest(b))]))


# --- bounds ----------------------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 8), st.floats(0, 0.95), st.integers(0, 10**6))
def test_no_choice_goes_below_the_bound(inputs: int, alike: float, seed: int) -> None:
    two = problem(inputs, 3, alike, seed=seed).between()
    bound = lower_bound(two)
    assert bool((bound >= 0).all())
    assert bool((bound <= optimum(two) * (1 + 1e-4) + 1e-7).all())


@pytest.mark.parametrize("alike", [0.0, 0.5, 0.95])
def test_branching_ends_at_the_optimum(alike: float) -> None:
    two = problem(8, 3, alike, seed=3).between()
    best, plain = optimum(two).double(), two.energy(nearest(two)).double()
    bound = certify(two, nearest(two), gap=0.0)  # the integers need not be the best ones
    assert bool((bound <= best * (1 + 1e-4) + 1e-7).all())
    assert bool((bound >= torch.minimum(best, plain) * (1 - 1e-4) - 1e-7).all())


def test_branching_certifies_a_gap_and_knows_when_to_stop() -> None:
    two = problem(24, 3, 0.8).between()
    q = anneal(two)
    found, plain = two.energy(q).double(), two.energy(nearest(two)).double()
    loose, tight, short = lower_bound(two), certify(two, q, gap=0.01), certify(two, q, gap=0.01, most=1)
    assert bool(((found - loose) / (plain - loose) > 0.01).all())
    torch.testing.assert_close((found - tight) / (plain - tight), torch.full_like(tight, 0.01), atol=1e-4, rtol=0)
    assert bool((loose <= short).all() and (short < tight).all())


def test_the_bound_is_the_optimum_where_inputs_have_nothing_in_common() -> None:
    two = problem(30, alike=0.0).between()
    assert torch.allclose(lower_bound(two), two.energy(nearest(two)).double(), rtol=0.01)


def test_the_bound_says_something_where_they_have() -> None:
    two = problem(30, alike=0.7).between()
    assert bool((lower_bound(two) > 0.3 * two.energy(anneal(two))).all())


def test_a_factor_of_inputs_that_are_all_the_same():
    """A sum in single precision whose rounding errors are larger than its damping; plain Cholesky gives up."""
    torch.manual_seed(0)
    H = 1e-6 * torch.ones(1, 256, 256) + 1e-8 * torch.eye(256)
    noise = 1e-8 * torch.randn(256, 256)
    H = H + noise + noise.T
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(H)
    upper = inverse_factor(H)
    assert upper.isfinite().all()
    assert (upper.tril(-1) == 0).all()
    best = 1e-8 * torch.eye(256)
    assert torch.allclose(inverse_factor(best[None]).mT @ inverse_factor(best[None]), best.inverse()[None], rtol=1e-4)


def test_moments_that_are_not_finite_are_refused():
    with pytest.raises(StepError, match="not finite"):
        inverse_factor(torch.full((1, 4, 4), torch.nan))
