"""How many channels each group keeps: budgets, measured sensitivity, measured times, and budgets that cannot be met."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from multum import Task, compress, prune
from multum.analyze import Latencies, latency
from multum.errors import StepError
from multum.graph import capture, layers
from multum.graph.axes import axes
from multum.prune import counts
from multum.prune.allocation import Budget, cumulated, least_loss
from multum.prune.sensitivity import sensitivity


class Chain(nn.Module):
    """Two hidden layers of 32 channels; the head reads only the first 8 of the second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1), nn.Linear(32, 5)
        with torch.no_grad():
            self.head.weight[:, 8:] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))


@pytest.fixture(scope="module")
def task() -> Task:
    torch.manual_seed(1)
    data = [(torch.randn(8, 3, 8, 8), torch.randint(0, 5, (8,))) for _ in range(4)]
    return Task(Chain(), data[0][0], calibration=data, loss=nn.functional.cross_entropy, train=data)


def left(task: Task, graph: Any) -> float:
    count = [counts.macs(g, axes(g), {}) for g in (graph, task.original)]
    return count[0] / count[1]


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0.05, 0.95), seed=st.integers(0, 9), other=st.floats(0.1, 1.0), multiple=st.sampled_from([1, 4, 8]))
def test_budgets_are_met_where_they_can_be(share: float, seed: int, other: float, multiple: int) -> None:
    graph = capture(Chain(), torch.zeros(2, 3, 8, 8))
    groups = axes(graph)
    chosen = [group for group in groups if not group.reason]
    generator = torch.Generator().manual_seed(seed)
    losses = {group.name: cumulated(torch.rand(group.size, generator=generator), False) for group in chosen}
    widths = {group.name: list(range(group.size - multiple, 3, -multiple)) for group in chosen}
    budgets = [Budget.make("macs", share, graph, groups), Budget.make("parameters", other, graph, groups)]
    found = least_loss(chosen, losses, widths, groups.factors, budgets)
    assert all(width in widths[name] for name, width in found.items())
    keep = {name: range(width) for name, width in found.items()}
    smallest = {name: range(rows[-1]) for name, rows in widths.items()}
    for budget in budgets:
        assert budget.left(keep) <= budget.share or found == {name: rows[-1] for name, rows in widths.items()}
        assert budget.left(keep) >= budget.left(smallest) - 1e-9
    looser = least_loss(chosen, losses, widths, groups.factors, [Budget.make("macs", min(1.0, share + 0.2), graph, groups)])
    assert sum(looser.values()) + 32 * (2 - len(looser)) >= sum(found.values()) + 32 * (2 - len(found))


def test_a_budget_takes_the_channels_that_cost_most_for_what_they_are_worth(task: Task) -> None:
    made = prune.Channels(macs=0.6, multiple=1, allocation="budget").plan(task.original, task)
    assert set(range(8)) <= set(made.changes["b:out"]["keep"])
    assert len(made.changes["b:out"]["keep"]) < 20  # 24 of its channels are read by nobody
    graph = compress(task, prune.Channels(macs=0.6, multiple=1, allocation="budget")).graph
    uniform = compress(task, prune.Channels(macs=0.6, multiple=1, allocation="uniform")).graph
    assert left(task, graph) <= 0.6 >= left(task, uniform)

    def change(graph: Any) -> float:
        return float(sum((graph(x) - task.original(x)).square().mean() for x, _ in task.data("calibration")))

    with torch.no_grad():
        assert change(graph) < 0.2 * change(uniform)


def test_without_a_budget_as_many_macs_are_left_as_with_the_same_share_everywhere(task: Task) -> None:
    uniform, budget = (compress(task, prune.Channels(ratio=0.5, allocation=name)).graph for name in ("uniform", "budget"))
    assert 0.7 * left(task, uniform) < left(task, budget) <= left(task, uniform)


def test_sensitivity_is_measured_and_changes_nothing(task: Task) -> None:
    groups, before = axes(task.original), task.original.fingerprint()
    chosen = [group for group in groups if not group.reason]
    scores = {group.name: torch.arange(32.0).flip(0) for group in chosen}  # the last channels go first
    found = sensitivity(task.original, groups, chosen, scores, task, 32)
    assert task.original.fingerprint() == before
    assert float(found["b:out"][23]) == pytest.approx(0.0, abs=1e-9)
    assert float(found["a:out"][23]) > 0.01
    for losses in found.values():
        assert bool((losses.diff() >= -1e-12).all())
    graph = compress(task, prune.Channels(macs=0.6, allocation="sensitivity")).graph
    assert left(task, graph) <= 0.6


def test_a_budget_out_of_reach_gives_the_nearest_and_says_what_is_in_the_way(task: Task) -> None:
    for allocation in ("uniform", "budget"):
        result = compress(task, prune.Channels(macs=0.001, floor=0.25, allocation=allocation))
        told = result.records[0].measured
        assert told["met"] is False
        assert told["left"]["macs"] == pytest.approx(left(task, result.graph), rel=1e-6)
        assert "macs" in told["binding"]
        assert "0.25" in told["binding"]
        assert result.graph.tensor("b.weight").shape[0] == 8
    assert compress(task, prune.Channels(macs=0.5)).records[0].measured["met"] is True


def test_sensitivity_needs_calibration_data() -> None:
    with pytest.raises(StepError, match="needs `calibration`"):
        compress(Task(Chain(), torch.zeros(2, 3, 8, 8)), prune.Channels(allocation="sensitivity"))


class Kinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.deep = nn.Conv2d(8, 64, 3, stride=2, padding=1), nn.Conv2d(64, 64, 3, padding="same", groups=64)
        self.point, self.head = nn.Conv2d(64, 64, 1), nn.Linear(64, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.point(self.deep(torch.relu(self.conv(x)))).flatten(2).transpose(1, 2))


def test_times_are_measured_for_each_kind_of_layer_and_grow_with_its_width() -> None:
    graph = capture(Kinds(), torch.zeros(2, 8, 64, 64))
    table, found = Latencies(graph), {layer.name: layer for layer in layers(graph)}
    covered = {name for name, layer in found.items() if table.covers(layer)}
    assert covered >= {"conv", "point", "head"}
    for name in covered:
        sizes = list(graph.tensor(found[name].weight).shape)
        assert 0 < table.ms(found[name], sizes) < 1000
        assert math.isfinite(table.ms(found[name], [max(1, size // 3) for size in sizes]))
    assert table.multiple(found["point"]) in (1, 2, 4, 8, 16, 32)


def test_a_latency_budget_is_met_in_the_table(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "_measured", lambda settings, weight, threads: 1.0 + math.prod(weight) / 100)
    result = compress(task, prune.Channels(latency=0.5, multiple=0))
    assert result.records[0].measured["left"]["latency"] <= 0.5
    assert result.records[0].measured["met"] is True
