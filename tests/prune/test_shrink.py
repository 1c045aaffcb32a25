"""`prune.Shrink`: penalties that draw channels to zero, rounds, and what is left in the end."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multum import Task, compress, prune
from multum.errors import StepError
from multum.graph.axes import axes
from multum.prune import counts
from multum.prune.shrink import Fading


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.n = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.b, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.n(self.a(x)))
        return self.head((x + torch.relu(self.b(x))).mean((2, 3)))


def make(**options: Any) -> Task:
    torch.manual_seed(1)
    data = [(x := torch.randn(16, 1, 6, 6), (x.mean((1, 2, 3)) > 0).long()) for _ in range(12)]
    return Task(Network(), data[0][0], **({"train": data, "calibration": data[:2], "loss": nn.functional.cross_entropy} | options))


@pytest.mark.parametrize("penalty", ["growing", "lasso", "slimming"])
def test_a_penalty_draws_channels_to_zero(penalty: str) -> None:
    result = compress(make(), prune.Shrink(ratio=0.5, multiple=1, penalty=penalty, strength=5.0, epochs=4, learning_rate=5e-3))
    (training,) = result.records[0].measured["trainings"]
    assert training["faded"] > 0.1
    assert result.graph.tensor("b.weight").shape[0] < 16


def test_growing_leaves_the_others_alone() -> None:
    task = make()
    graph = task.original.copy().requires_grad_(True)
    groups = axes(graph)
    group = next(group for group in groups if not group.reason)
    fading = Fading("", "growing", 1.0, groups, [group], {group.name: torch.tensor([1, 3])})
    fading.join(graph)
    fading.before(0, 2)
    half = fading.term()
    assert float(half) == pytest.approx(0.5)
    half.backward()
    name, dim = group.members[0]
    moved = graph.tensor(name).grad.abs().movedim(dim, 0).flatten(1).sum(1).nonzero().flatten()
    assert moved.tolist() == [1, 3]
    fading.before(1, 2)
    assert float(fading.term()) == pytest.approx(1.0)


@pytest.mark.parametrize("rounds", [1, 3])
def test_rounds_end_at_the_width_that_was_planned(rounds: int) -> None:
    task = make()
    step = prune.Shrink(macs=0.4, multiple=1, penalty="none", rounds=rounds, epochs=1.5)
    result = compress(task, step)
    planned = {name: len(change["keep"]) for name, change in result.records[0].changes.items()}
    groups = axes(result.graph)
    assert {name: groups[name].size for name in planned} == planned
    share = counts.macs(result.graph, groups, {}) / counts.macs(task.original, axes(task.original), {})
    assert share <= 0.4
    assert result.records[0].measured["left"]["macs"] == pytest.approx(share)
    assert len(result.records[0].measured["trainings"]) == rounds


def test_an_interrupted_training_goes_on_to_the_same_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, step = make(), prune.Shrink(ratio=0.5, rounds=2, epochs=2, multiple=1)
    whole = compress(task, step).graph
    monkeypatch.setattr("multum.train.loop.CHECKPOINT_SECONDS", 0.0)
    before, count = Fading.before, 0

    def stops(self: Fading, at: int, steps: int) -> None:
        nonlocal count
        count += 1
        if count == 16:  # in the second round
            raise KeyboardInterrupt
        before(self, at, steps)

    monkeypatch.setattr(Fading, "before", stops)
    with pytest.raises(KeyboardInterrupt):
        compress(task, step, workdir=tmp_path)
    monkeypatch.setattr(Fading, "before", before)
    resumed = compress(task, step, workdir=tmp_path).graph
    for name, tensor in whole.named_tensors():
        torch.testing.assert_close(resumed.tensor(name), tensor)


@pytest.mark.parametrize("options", [{"penalty": "ridge"}, {"rounds": 0}, {"strength": -1.0}], ids=str)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(StepError, match="Expected"):
        prune.Shrink(**options)


def test_training_data_are_needed() -> None:
    with pytest.raises(StepError, match="needs `train`"):
        compress(make(train=None), prune.Shrink())
