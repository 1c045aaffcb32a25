"""How far a candidate is from a target, on numbers worked by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch

from multum.search.evaluate import Candidate
from multum.search.judge import Judge
from multum.search.target import Target
from multum.step import Recipe
from multum.task import Task


def candidate(size: int, wrong: int, speed: float = 1.0) -> Candidate:
    scores = np.where(np.arange(1000) < wrong, 0.0, 100.0)
    return Candidate("one", Recipe([]), Path("one"), size, 0.0, scores=scores, latency=1.0, speed=speed)


def judge(higher_is_better: bool = True, **target: object) -> Judge:
    task = Task(torch.nn.Linear(2, 2), torch.zeros(1, 2), higher_is_better=higher_is_better)
    return Judge(task, Target(**target), candidate(1000, 0))  # type: ignore[arg-type]


def test_each_miss_is_relative_to_what_was_asked() -> None:
    assert judge(size="1/10", speed=2, max_drop=2).missed(candidate(150, 50, 1.6)) == pytest.approx(
        {"size": 0.5, "speed": 0.25, "drop": 1.5}
    )


@pytest.mark.parametrize(("wrong", "missed"), [(5, set()), (6, {"drop"})])
def test_a_drop_is_met_up_to_the_largest_that_is_allowed(wrong: int, missed: set[str]) -> None:
    assert set(judge(max_drop=0.5).missed(candidate(100, wrong))) == missed


@pytest.mark.parametrize(("size", "missed"), [(100, set()), (101, {"size"})])
def test_a_size_is_met_to_the_byte(size: int, missed: set[str]) -> None:
    assert set(judge(size="1/10").missed(candidate(size, 0))) == missed


def test_where_less_is_better_a_lower_score_is_no_drop() -> None:
    assert judge(higher_is_better=False, max_drop=0.5).missed(candidate(100, 100)) == {}


def test_safe_asks_for_the_bound_and_not_the_mean() -> None:
    lost = candidate(100, 4)  # 0.4 points, with 95 % confidence at most 0.73
    assert judge(max_drop=0.5).missed(lost) == {}
    assert not judge(max_drop=0.5).safe(lost)
    assert judge(max_drop=0.8).safe(lost)


def test_the_nearer_is_better_then_the_faster_then_what_loses_less() -> None:
    order = [candidate(90, 1), candidate(80, 3), candidate(80, 0, speed=0.9), candidate(150, 0), candidate(90, 40)]
    backwards = order[::-1]
    assert sorted(backwards, key=judge(size="1/10", max_drop=0.5).rank) == order
