"""The surgeon's arithmetic against the optimum found by least squares."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from multum.errors import StepError
from multum.prune import obs
from multum.prune.obs import Choice, restored, shrunk, sparsegpt
from multum.prune.weights import lowest


def problem(seed: int, groups: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, columns and missing outputs."""
    torch.manual_seed(seed)
    mixed = torch.randn(groups, inputs, inputs) @ torch.randn(groups, inputs, 50)  # columns that depend on each other
    return torch.randn(groups, outputs, inputs).double(), mixed.double(), torch.randn(groups, outputs, 50).double()


def loss(old: Tensor, new: Tensor, x: Tensor, e: Tensor) -> float:
    return float((old @ x + e - new @ x).square().sum())


@given(st.integers(0, 50), st.integers(1, 2), st.integers(1, 4), st.integers(2, 8))
@settings(max_examples=30, deadline=None)
def test_the_optimum_of_a_mask(seed: int, groups: int, outputs: int, inputs: int) -> None:
    weight, x, e = problem(seed, groups, outputs, inputs)
    zero = torch.rand(weight.shape) < 0.5
    gram = x @ x.transpose(1, 2)
    new = restored(weight, gram, zero, e @ x.transpose(1, 2))
    assert (new[zero] == 0).all()
    damping = obs._damped(gram) - gram
    for g in range(groups):
        for o in range(outputs):
            kept = ~zero[g, o]
            a = (gram + damping)[g][kept][:, kept]
            b = (weight[g, o] @ (gram + damping)[g] + e[g, o] @ x[g].T)[kept]
            torch.testing.assert_close(new[g, o, kept], torch.linalg.solve(a, b), rtol=1e-3, atol=1e-3)


@given(st.integers(0, 20))
@settings(max_examples=10, deadline=None)
def test_every_surgeon_loses_less_than_the_mask_alone(seed: int) -> None:
    weight, x, e = problem(seed, 1, 6, 12)
    gram, pull = x @ x.transpose(1, 2), e @ x.transpose(1, 2)
    for surgeon in obs.SURGEONS.values():
        new = surgeon(weight, gram, pull, lowest(36, 72))
        zero = new == 0
        assert zero.sum() == 36
        assert loss(weight, new, x, e) < loss(weight, weight.masked_fill(zero, 0), x, e)


def test_one_round_of_obs_by_hand() -> None:
    """H = [[2, 1], [1, 2]]: its inverse is [[2, -1], [-1, 2]] / 3. Of w = (1, 2) the first goes; the other grows by 1 * 1 / 2."""
    weight, gram = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])
    pull = torch.zeros(1, 1, 2)
    for surgeon in obs.SURGEONS.values():
        torch.testing.assert_close(surgeon(weight, gram, pull, lowest(1, 2)), torch.tensor([[[0.0, 2.5]]]), rtol=0.01, atol=0.01)


def test_few_columns_are_believed_in_part() -> None:
    """One column for three inputs: a quarter of the gram stays beside the diagonal, which stays whole."""
    gram, pull = shrunk(torch.full((1, 3, 3), 4.0), torch.full((1, 2, 3), 8.0), 1)
    torch.testing.assert_close(gram, torch.full((1, 3, 3), 1.0) + 3 * torch.eye(3))
    torch.testing.assert_close(pull, torch.full((1, 2, 3), 2.0))


@pytest.mark.parametrize("surgeon", obs.SURGEONS)
def test_a_gram_of_few_columns_loses_less_on_others_when_it_is_shrunk(surgeon: str) -> None:
    torch.manual_seed(0)
    mixing, weight = torch.randn(64, 64) / 8, torch.randn(1, 10, 64)
    seen, others = (torch.relu(mixing @ torch.randn(64, count)).double() for count in (24, 2000))
    gram, pull, lost = (seen @ seen.T)[None], torch.zeros(1, 10, 64), []
    for sums in ((gram, pull), shrunk(gram, pull, 24)):
        new = obs.SURGEONS[surgeon](weight, *sums, lowest(320, 640)).double()
        lost.append(loss(weight.double(), new, others[None], torch.zeros(1, 10, 2000)))
    assert lost[1] < 0.8 * lost[0]


def test_sparsegpt_asks_for_whole_units_of_columns() -> None:
    weight, x, _ = problem(0, 1, 3, 12)
    asked = []

    def choose(scores: Tensor, columns: slice, part: float) -> Tensor:
        asked.append((columns.start, columns.stop))
        return torch.zeros_like(scores, dtype=torch.bool)

    new = sparsegpt(weight, x @ x.transpose(1, 2), torch.zeros_like(weight), Choice(choose, 5), block=6)
    assert asked == [(0, 5), (5, 10), (10, 12)]
    torch.testing.assert_close(new, weight)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, x, e = problem(1, 1, 3, 4)
    x[:, 2] = 0
    for surgeon in obs.SURGEONS.values():
        assert torch.isfinite(surgeon(weight, x @ x.transpose(1, 2), e @ x.transpose(1, 2), lowest(6, 12))).all()


def test_a_gram_that_rounding_made_indefinite_is_damped_until_it_has_an_inverse() -> None:
    gram = torch.tensor([[[1e-9, 2e-8], [2e-8, -4e-8]]])
    assert torch.linalg.eigvalsh(obs._damped(gram)).min() < 0
    assert torch.linalg.eigvalsh(obs.inverse(gram)).min() > 0
    with pytest.raises(StepError, match="not finite"):
        obs.inverse(torch.full((1, 2, 2), torch.nan))
