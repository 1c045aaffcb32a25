"""CP: exact where the weight has the rank, within its bound where terms would grow, and the layer kept where it does not settle."""

import pytest
import torch
from torch import nn

from multum import Task, capture, compress
from multum.errors import StepError
from multum.factorize import CP
from multum.factorize.cp import alternating
from multum.graph import layers


def of_rank(module: nn.Module, rank: int, parts: int) -> nn.Module:
    torch.manual_seed(0)
    outputs, inputs, *window = module.weight.shape
    sizes = [outputs, inputs, *([module.weight[0, 0].numel()] if parts == 3 else window)]
    factors = [torch.randn(size, rank) for size in sizes]
    letters = "oikl"[: len(sizes)]
    made = torch.einsum(",".join(f"{letter}r" for letter in letters) + "->" + letters, *factors)
    module.weight.data = made.reshape(module.weight.shape)
    return module


CASES = [
    (nn.Conv2d(8, 16, 3, stride=2, padding=1, dilation=2), torch.randn(2, 8, 9, 9), 3, 8 + 9 + 16),
    (nn.Conv2d(8, 16, (3, 5), stride=(1, 2), padding=(1, 2), bias=False), torch.randn(2, 8, 9, 11), 4, 8 + 3 + 5 + 16),
    (nn.Conv2d(8, 16, 3, padding="same"), torch.randn(2, 8, 9, 9), 4, 8 + 3 + 3 + 16),
    (nn.Conv1d(8, 16, 5, padding=2), torch.randn(2, 8, 9), 3, 8 + 5 + 16),
    (nn.Conv3d(4, 16, 3), torch.randn(2, 4, 4, 4, 4), 3, 4 + 27 + 16),
]


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize(("module", "example", "parts", "each"), CASES)
def test_a_weight_of_rank_three_becomes_a_chain_that_computes_the_same(module, example, parts, each, data):
    calibration = [(example, torch.zeros(2))] * 2 if data else None
    task = Task(nn.Sequential(of_rank(module, 3, parts)).eval(), example, calibration=calibration)
    result = compress(task, CP(rank=3, parts=parts))
    change = result.records[0].changes["0"]
    assert change["parameters"] == [module.weight.numel(), 3 * each]
    assert [layer.name for layer in layers(result.graph)] == [f"0.factor{place}" for place in range(parts)]
    larger = torch.cat([example, example])
    for x in (example, larger):
        wanted = task.original(x)
        torch.testing.assert_close(result.graph(x), wanted, rtol=0, atol=5e-3 * float(wanted.detach().abs().max()))


def growing() -> torch.Tensor:
    """A tensor that two terms come as near to as one likes, but only as they grow and cancel (De Silva & Lim 2008, proposition 4.6)."""
    random = torch.Generator().manual_seed(0)
    a, b, c, x, y, z = torch.linalg.qr(torch.randn(6, 6, generator=random, dtype=torch.double))[0]
    parts = [torch.einsum("i,j,k->ijk", *vectors) for vectors in ((x, b, c), (a, y, c), (a, b, z))]
    return torch.stack(parts).sum(0)


def terms(tensor: torch.Tensor, bound: float) -> tuple[float, float, bool]:
    factors, settled = alternating(tensor, 2, 5000, bound)
    factors = [factor.double() for factor in factors]
    made = torch.einsum("ir,jr,kr->ijk", *factors)
    squares = torch.stack([factor.norm(dim=0) for factor in factors]).prod(0).square().sum()
    return float(squares), float((made - tensor / tensor.norm()).square().sum()), settled


def test_terms_that_cancel_are_kept_within_the_bound():
    """Nearer at larger norms, and without a bound at ever larger ones."""
    (squares, misses, settled), (free, near, _) = terms(growing(), 3.5), terms(growing(), 1e9)
    assert settled
    assert squares <= 3.5 < free
    assert 0.1 > misses > near
    assert not terms(growing(), 1.0)[2]


def test_a_layer_for_which_it_does_not_settle_is_kept_and_told():
    task = Task(nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 3)), torch.randn(2, 8, 9, 9))
    plan = CP(rank=4, rounds=2).plan(task.original, task)
    assert not plan.changes
    assert plan.skipped == dict.fromkeys("01", "CP did not settle in 2 rounds within its bound at rank 4")
    with pytest.raises(StepError, match=r"would change nothing.*did not settle"):
        compress(task, CP(rank=4, rounds=2))


def test_ranks_that_do_not_settle_are_left_out_of_the_choice():
    """Low ranks settle in a few rounds, higher ones do not."""
    task = Task(nn.Sequential(of_rank(nn.Conv2d(8, 16, 3), 4, 3)), torch.randn(2, 8, 9, 9))
    change = CP(rounds=6, energy=0.2).plan(task.original, task).changes["0"]
    assert change["rank"] == 2
    assert change["note"].startswith("CP did not settle in 6 rounds within its bound at rank ")


def test_what_is_not_for_it_and_bad_options():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, (1, 3)), nn.ConvTranspose2d(8, 8, 3))
    assert CP(parts=4).plan(capture(model, torch.randn(2, 8, 9, 9)), None).skipped == {
        "0": "it has groups",
        "1": "its window is a point: factorize.SVD is for that",
        "2": "its window is not two-dimensional: parts=3 is for that",
        "3": "it is a transposed convolution",
    }
    for options in ({"parts": 5}, {"rounds": 0}, {"bound": 0.5}):
        with pytest.raises(StepError):
            CP(**options)
