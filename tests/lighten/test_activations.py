"""Cheap activation functions: which come in, how much they may change, and what is refused."""

import pytest
import torch
from torch import nn

from multum import Task, compress
from multum.errors import StepError
from multum.graph.model import aten
from multum.lighten import Activations


def task(*middle: nn.Module, data: bool = True) -> Task:
    torch.manual_seed(0)
    parts = [part for activation in middle for part in (nn.Linear(16, 16), activation)]
    batches = [(torch.randn(32, 16), torch.zeros(32))]
    return Task(nn.Sequential(*parts, nn.Linear(16, 4)).eval(), batches[0][0][:2], calibration=batches if data else None)


def test_each_becomes_the_nearest_of_its_kind():
    job = task(nn.SiLU(), nn.Sigmoid(), nn.Tanh(), nn.GELU(approximate="tanh"), nn.ELU())
    result = compress(job, Activations(limit=1.0))
    assert [change["is"] for change in result.records[0].changes.values()][:3] == ["hardswish", "hardsigmoid", "hardtanh"]
    assert [change["was"] for change in result.records[0].changes.values()] == ["silu", "sigmoid", "tanh", "gelu", "elu"]
    assert not result.graph.find(aten.silu.default, aten.sigmoid.default, aten.tanh.default, aten.gelu.default, aten.elu.default)
    expected = nn.Sequential(nn.Hardswish(), nn.Hardsigmoid(), nn.Hardtanh())
    x, linear = job.example, list(job.model)[::2]
    for layer, function in zip(linear[:3], expected, strict=True):
        x = function(layer(x))
    graph = result.graph
    graph.tap(graph.find(aten.hardtanh.default))
    graph(job.example)
    torch.testing.assert_close(graph.tapped[0], x)


def test_the_change_of_all_together_stays_within_the_limit():
    job = task(nn.SiLU(), nn.GELU(), nn.SiLU())
    result = compress(job, Activations(limit=0.0003))
    record, x = result.records[0], job.calibration[0][0]
    off = float((result.graph(x) - job.original(x)).detach().square().sum() / job.original(x).square().sum())
    assert 0 < off <= 0.0003
    assert record.measured["change"] == pytest.approx(off, rel=1e-3)
    assert record.skipped
    assert all("would move the outputs by" in reason for reason in record.skipped.values())


def test_what_is_named_alone_is_tried():
    job = task(nn.SiLU(), nn.SiLU())
    record = compress(job, Activations(limit=1.0, by="relu", include="3")).records[0]
    assert [(change["is"], change["in"]) for change in record.changes.values()] == [("relu", "3")]
    assert list(record.skipped.values()) == ["silu in 1 is excluded"]
    plan = Activations().plan(task(nn.ReLU()).original, task(nn.ReLU()))
    assert plan.skipped == {"*": "the network has no smooth activation function"}


def test_bad_input():
    with pytest.raises(StepError, match=r"lighten\.Activations needs `calibration`"):
        compress(task(nn.SiLU(), data=False), Activations())
    for options in ({"by": "hardswich"}, {"limit": 0.0}, {"samples": 0}):
        with pytest.raises(StepError, match=r"lighten\.Activations"):
            Activations(**options)
