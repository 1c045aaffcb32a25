"""Paired statistics, by numbers worked by hand or read from printed tables, and invariants."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multum.analyze.statistics import Drop, _student_95, _student_two_sided, agreement, compare, median_interval
from multum.errors import MultumError


def paired(n: int, lost: int, won: int, unit: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Scores of n samples of which ``lost`` were right only before and ``won`` only after; the others are half right, half wrong."""
    before, after = np.zeros(n), np.zeros(n)
    before[:lost] = 1
    after[lost : lost + won] = 1
    rest = lost + won + (n - lost - won) // 2
    before[rest:] = after[rest:] = 1
    return before * unit, after * unit


@pytest.mark.parametrize(
    ("n", "discordant", "margin", "proves"),
    # The largest observed drop, in points, that proves a true drop of at most `margin` points, to two digits.
    [
        (10_000, 0.01, 0.5, 0.34),
        (10_000, 0.02, 0.5, 0.27),
        (10_000, 0.04, 0.5, 0.17),
        (1_797, 0.01, 0.5, 0.11),
        (1_797, 0.01, 1.0, 0.61),
        (1_797, 0.02, 1.0, 0.45),
        (1_797, 0.04, 1.0, 0.22),
        (872, 0.01, 1.0, 0.44),
        (872, 0.02, 1.0, 0.21),
    ],
)
def test_what_test_sizes_can_prove(n, discordant, margin, proves):
    count = round(discordant * n)

    def bound(points: float) -> float:
        lost = (count + points / 100 * n) / 2
        drop = compare(*paired(n, round(lost), count - round(lost), 100.0))
        # What rounding the drop to whole samples moved is moved back; rounding `count` moves up to 0.007 points.
        return drop.bound - (drop.points - points)

    assert bound(proves - 0.016) <= margin
    assert bound(proves + 0.016) > margin


def test_what_test_sizes_cannot_prove():
    for n, discordant in ((1_797, 0.02), (872, 0.01), (360, 0.01)):
        half = round(discordant * n / 2)
        assert compare(*paired(n, half, half, 100.0)).bound > 0.5


def test_a_bound_by_hand():
    # 100 samples, 6 lost, 2 won: drop 0.04, variance 0.08 - 0.0016 = 0.0784, root 0.28, over 10; 0.04 + 1.6449 * 0.028 = 0.08606
    drop = compare(*paired(100, 6, 2))
    assert drop.points == pytest.approx(0.04)
    assert drop.bound == pytest.approx(0.086056, abs=1e-5)
    assert (drop.n, drop.discordant) == (100, 8)
    # exact McNemar: 2 * (1 + 8 + 28) / 256
    assert drop.p == pytest.approx(74 / 256)


def test_a_unit_scales_points_and_bound_only():
    one, hundred = compare(*paired(100, 6, 2)), compare(*paired(100, 6, 2, 100.0))
    assert hundred.points == pytest.approx(100 * one.points)
    assert hundred.bound == pytest.approx(100 * one.bound)
    assert (hundred.p, hundred.n, hundred.discordant) == (one.p, one.n, one.discordant)
    assert compare([True, False], [False, False]).points == 0.5


def test_mcnemar_with_many_discordant_samples():
    # 30 lost, 10 won: chi-square = (20 - 1)^2 / 40 = 9.025; its p with one degree of freedom is 0.00266
    assert compare(*paired(1000, 30, 10)).p == pytest.approx(0.00266, abs=1e-5)
    assert compare(*paired(1000, 20, 20)).p == 1.0


def test_nothing_discordant_is_not_a_proof():
    same = np.ones(100)
    # of 100 samples none differs with probability 5 % when 1 - 0.05^(1/100) = 2.951 % do
    assert compare(same, same) == Drop(0.0, pytest.approx(0.029513, abs=1e-6), 1.0, 100, 0)
    assert compare(*paired(10_000, 0, 0, 100.0)).bound == pytest.approx(0.02995, abs=1e-5)


def test_real_scores_by_hand():
    # differences 1, 2, 3, 6: mean 3, sd sqrt(14/3) = 2.1602, error 1.0801, t = 2.7775; 3 degrees of freedom: quantile 2.3534
    drop = compare([1.0, 3.0, 5.0, 9.0], [0.0, 1.0, 2.0, 3.0])
    assert drop.points == 3.0
    assert drop.bound == pytest.approx(3 + 2.3534 * 1.0801, abs=1e-3)
    assert drop.p == pytest.approx(0.0691, abs=2e-4)
    assert (drop.n, drop.discordant) == (4, 4)


def test_constant_differences_of_real_scores():
    scores = np.arange(5.0)
    assert compare(scores, scores - 1) == Drop(1.0, 1.0, 0.0, 5, 5)
    assert compare(scores, scores) == Drop(0.0, 0.0, 1.0, 5, 0)


def test_lower_is_better_and_single_numbers():
    assert compare(10.0, 12.5, higher_is_better=False) == Drop(2.5, None, None, 1, None)
    assert compare(torch.tensor(92.0), 93.0) == Drop(-1.0, None, None, 1, None)


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 6.3138), (2, 2.9200), (3, 2.3534), (4, 2.1318), (5, 2.0150), (10, 1.8125), (30, 1.6973), (120, 1.6577)]
)
def test_students_quantiles_are_the_printed_ones(freedom, quantile):
    assert _student_95(freedom) == pytest.approx(quantile, abs=6e-5)


def test_students_distribution_joins_the_normal():
    assert _student_two_sided(1.96, 1000) == pytest.approx(_student_two_sided(1.96, 1001), abs=3e-4)
    assert _student_two_sided(0.0, 7) == 1.0


two_valued = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=80)
real = st.lists(st.tuples(*[st.floats(-100, 100)] * 2), min_size=2, max_size=40)


@given(st.one_of(two_valued, real))
def test_invariants_of_a_comparison(pairs):
    before, after = (np.array(side, float) for side in zip(*pairs, strict=True))
    drop, back = compare(before, after), compare(after, before)
    assert drop.points == pytest.approx(-back.points)
    assert drop.points == pytest.approx(before.mean() - after.mean(), abs=1e-9)
    assert drop.bound >= drop.points
    assert drop.p == pytest.approx(back.p)
    assert 0 <= drop.p <= 1
    assert compare(before, after, higher_is_better=False).points == back.points
    assert 0 <= drop.discordant <= drop.n == len(pairs)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([1.0, 0.0], [1.0], "Scores of shapes [2] and [1]"),
        ([1.0, 0.0], 1.0, "Scores of shapes [2] and []"),
        ([1.0, math.nan], [1.0, 0.0], "1 of 2 scores before are NaN"),
        ([1.0, 0.0], [math.inf, math.nan], "2 of 2 scores after are NaN"),
        (math.nan, 1.0, "1 of 1 scores before are NaN"),
        ([], [], "The scores before have the shape [0]"),
        ([[1.0]], [[1.0]], "The scores before have the shape [1, 1]"),
    ],
)
def test_scores_that_cannot_be_compared(before, after, message):
    with pytest.raises(MultumError) as error:
        compare(before, after)
    assert error.value.given.startswith(message)
    assert error.value.expected


def test_agreement_counts_equal_choices():
    a = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [5.0, 4.0]])
    b = np.array([[0.0, 9.0], [0.0, 1.0], [0.0, 2.0], [1.0, 0.0]], np.float32)
    assert agreement(a, b) == 75.0
    assert agreement({"ids": torch.arange(4), "logits": a}, (torch.arange(4), [b])) == 75.0


def test_agreement_of_maps_has_classes_where_they_are_said_to_be():
    maps = torch.zeros(1, 2, 2, 2)
    maps[0, 1] = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    assert agreement(maps, torch.zeros(1, 2, 2, 2), axis=1) == 25.0


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 3), "Outputs of shapes [2, 3] and [3, 3]"),
        (torch.zeros(4, 1), torch.zeros(4, 1), "Outputs of shapes [4, 1] and [4, 1]"),
        (torch.zeros(0, 3), torch.zeros(0, 3), "Outputs of shapes [0, 3] and [0, 3]"),
        (torch.full((2, 3), math.nan), torch.zeros(2, 3), "The outputs hold NaN"),
        ({"ids": torch.zeros(2, 3, dtype=torch.int64)}, torch.zeros(2, 3), "The output, a dict, holds no floating tensor"),
    ],
)
def test_outputs_that_cannot_be_compared(a, b, message):
    with pytest.raises(MultumError) as error:
        agreement(a, b)
    assert error.value.given.startswith(message)


def test_the_interval_of_a_median():
    # With 5 values the extremes miss the median with probability 2 / 32 > 5 %; with 6, 2 / 64; of 9, one at each end may go: 20 / 512.
    assert median_interval(range(5)) is None
    assert median_interval([5, 3, 1, 0, 2, 4]) == (0, 5)
    assert median_interval(range(9)) == (1, 7)
    assert median_interval(range(30)) == (9, 20)


@given(st.lists(st.floats(-5, 5), min_size=6, max_size=60))
def test_a_median_lies_in_its_interval(values):
    low, high = median_interval(values)
    assert low <= np.median(values) <= high
    wide = median_interval(values, 0.99)
    assert wide is None or wide[0] <= low <= high <= wide[1]
