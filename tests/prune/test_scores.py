"""Criteria, worked by hand."""

import pytest
import torch
from torch import nn

from multum import capture
from multum.graph.axes import axes
from multum.prune.scores import CRITERIA, batch_norm, magnitude, magnitude_l1

FIRST = torch.tensor([[3.0, 4.0], [0.0, 5.0], [8.0, 6.0]])  # L2 5, 5, 10; L1 7, 5, 14
SECOND = torch.tensor([[1.0, 0.0, 0.0], [0.0, 3.0, -1.0], [0.0, 4.0, 1.0]])  # down the columns L2 1, 5, sqrt 2; L1 1, 7, 2


def scores(criterion: str, norm: list[float] | None = None) -> list[float]:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3) if norm else nn.ReLU(), nn.Linear(3, 3))
    with torch.no_grad():
        model[0].weight.copy_(FIRST)
        model[2].weight.copy_(SECOND)
        if norm:
            model[1].weight.copy_(torch.tensor(norm))
    graph = capture(model, torch.zeros(2, 2))
    groups = axes(graph)
    return CRITERIA[criterion](graph, groups, groups["0:out"]).tolist()


def mean_one(values: list[float]) -> list[float]:
    return pytest.approx([value * len(values) / sum(values) for value in values])


def test_magnitude_is_what_makes_a_channel_times_what_reads_it() -> None:
    assert scores("magnitude") == mean_one([5 * 1, 5 * 5, 10 * 2**0.5])
    assert scores("magnitude_l1") == mean_one([7 * 1, 5 * 7, 14 * 2])


def test_the_scale_of_a_normalization_takes_the_place_of_what_makes_a_channel() -> None:
    assert scores("magnitude", [2.0, -0.5, 1.0]) == mean_one([2 * 1, 0.5 * 5, 1 * 2**0.5])
    assert scores("batch_norm", [2.0, -0.5, 1.0]) == mean_one([2, 0.5, 1])


def test_batch_norm_falls_back_on_magnitude() -> None:
    assert scores("batch_norm") == scores("magnitude")


def test_every_place_of_a_channel_counts() -> None:
    """A channel of a convolution that is flattened is read by one column for each pixel."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(8, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1))
        model[2].weight.copy_(torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 3.0, 4.0, 0.0]]))
    graph = capture(model, torch.zeros(2, 1, 2, 2))
    groups = axes(graph)
    assert magnitude(graph, groups, groups["0:out"]).tolist() == mean_one([1 * 2, 2 * 5])
    assert magnitude_l1(graph, groups, groups["0:out"]).tolist() == mean_one([1 * 4, 2 * 7])
    assert batch_norm(graph, groups, groups["0:out"]).tolist() == mean_one([1 * 2, 2 * 5])
