"""Bounds are bounds: known distributions have known ones, and what was coded lies between."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import multum
from multum.pack import limits, mip
from multum.pack.limits import rate

RANDOM = np.random.default_rng(0)
NORMAL = RANDOM.normal(size=100_000)


@pytest.mark.parametrize("distortion", [0.7, 0.3, 0.1, 0.02, 0.005, 1e-4])
def test_a_gaussian_has_the_rate_of_the_textbook(distortion):
    exact = -math.log2(distortion) / 2
    assert exact - 0.06 < rate(NORMAL, distortion) <= exact + 0.005


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("distortion", [0.02, 0.1])
def test_a_few_far_numbers_are_no_trouble(distortion):
    values = np.concatenate([NORMAL[:20_000], [60.0, -60.0] * 8])
    assert 0 < rate(values / values.std(), distortion) < rate(NORMAL, distortion)


@pytest.mark.parametrize("distortion", [0.1, 0.2])
def test_fair_signs_need_what_the_textbook_says_at_most(distortion):
    """A code for signs may send the sign with errors: h(p) bits at a squared error of 4p, and less is possible."""
    signs = np.where(RANDOM.random(10_000) < 0.5, -1.0, 1.0)
    p = distortion / 4
    hamming = 1 + p * math.log2(p) + (1 - p) * math.log2(1 - p)
    assert 0.5 * hamming < rate(signs, distortion) <= hamming + 1e-6


def test_what_need_not_be_kept_costs_nothing_and_less_distortion_costs_more():
    assert rate(NORMAL, 1.1) == 0.0
    laplace = RANDOM.laplace(size=50_000) / math.sqrt(2)
    rates = [rate(laplace, d) for d in (0.9, 0.5, 0.1, 0.011, 0.009, 0.001)]
    assert rates == sorted(rates)
    assert rates[2] < -math.log2(0.1) / 2  # a Gaussian is the hardest of its variance


def test_no_quantizer_is_better():
    for step in (0.3, 1.0, 2.0):
        for values in (NORMAL, RANDOM.laplace(size=100_000), RANDOM.uniform(-1, 1, 100_000)):
            levels = np.round(values / values.std() / step)
            shares = np.unique(levels, return_counts=True)[1] / levels.size
            error = np.square(levels * step - values / values.std()).mean()
            assert rate(values / values.std(), error) <= -(shares * np.log2(shares)).sum() + 1e-3


@pytest.fixture(scope="module")
def task() -> multum.Task:
    torch.manual_seed(0)
    return multum.Task(nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 36, 32)), torch.randn(2, 3, 8, 8))


def test_a_file_is_accounted_for(task, tmp_path):
    size = multum.save(multum.compress(task, multum.quantize.WeightOnly(bits=4, edges=4)), tmp_path / "x.mip", task)
    found = limits(tmp_path / "x.mip", task.original)
    assert found.bytes == size == found.header + sum(row.bytes for row in found.tensors)
    rows = {row.name: row for row in found.tensors}
    linear = rows["3.weight"]
    assert linear.bytes < 1.02 * linear.entropy
    assert linear.bound <= linear.entropy  # one number cannot say more than its entropy
    assert linear.bound < linear.bytes
    assert 0.5 * linear.gaussian < linear.bound <= 1.02 * linear.gaussian  # initial weights are uniform
    assert rows["3.bias"].bound is None
    data = found.to_data()
    assert data["total"]["bytes"] + data["rest"] + data["header"] == data["bytes"] == size
    assert data["total"]["numbers"] == 32 * 64 * 36 + 64 * 27


def test_a_factor_of_each_channel_is_no_distortion(task, tmp_path):
    """Folding a normalization into a weight changes nothing of what it says."""
    graph = task.original.copy()
    with torch.no_grad():
        graph.tensor("3.weight").mul_(torch.rand(32, 1) + 0.5).add_(1e-4 * torch.randn(32, 64 * 36))
    multum.save(graph, tmp_path / "x.mip")
    row = next(row for row in limits(tmp_path / "x.mip", task.original).tensors if row.name == "3.weight")
    assert 0 < row.distortion < 1e-3


def test_without_an_original_sizes_and_entropies_remain(task, tmp_path):
    multum.save(multum.compress(task, multum.quantize.WeightOnly(bits=4)), tmp_path / "x.mip", task)
    found = limits(tmp_path / "x.mip")
    assert all(row.bound is None for row in found.tensors)
    assert next(row for row in found.tensors if row.name == "3.weight").entropy > 0


def test_a_cut_tensor_has_no_bound(task, tmp_path):
    multum.save(multum.compress(task, [multum.prune.Channels(ratio=0.5), multum.quantize.WeightOnly()]), tmp_path / "x.mip", task)
    assert limits(tmp_path / "x.mip", task.original).to_data()["total"]["numbers"] == 0


def test_tensors_of_one_stream_share_its_bytes_by_their_entropy(tmp_path):
    random = np.random.default_rng(0)
    arrays = {"a": random.integers(-60, 60, 400).astype(np.int8), "b": (random.random(400) < 0.02).astype(np.int8)}
    mip.write(tmp_path / "two.mip", {}, arrays)
    rows = {row.name: row for row in limits(tmp_path / "two.mip").tensors}
    assert sum(row.bytes for row in rows.values()) == sum(mip.sizes(tmp_path / "two.mip").values())
    assert rows["a"].bytes > 5 * rows["b"].bytes
    assert mip.sizes(tmp_path / "two.mip")["a"] == pytest.approx(mip.sizes(tmp_path / "two.mip")["b"], abs=1)
