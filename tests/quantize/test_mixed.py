"""Bits of weights by what they cost the outputs, under a budget."""

import pytest
import torch
from torch import nn

from multum.errors import StepError
from multum.graph import layers
from multum.graph.model import read
from multum.quantize import Mixed, WeightOnly
from multum.quantize.mixed import allot
from multum.step import compress
from multum.task import Task
from multum.testing import Trial


def uneven() -> Task:
    """Two branches, of which one hardly shows in the outputs."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.loud, self.soft = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.loud(x) + 0.01 * self.soft(x)

    batches = [(torch.randn(32, 16, generator=torch.Generator().manual_seed(seed)), 0) for seed in range(3)]
    return Task(Branches(), batches[0][0][:2], calibration=batches)


def test_bits_go_where_they_save_most_by_hand() -> None:
    errors = {"a": {2: 1.0, 3: 0.3, 4: 0.1, 5: 0.03, 6: 0.01, 8: 0.0}, "b": {2: 0.1, 3: 0.05, 4: 0.02, 5: 0.01, 6: 0.005, 8: 0.0}}
    assert allot(errors, {"a": 10, "b": 10}, 2.0) == {"a": 2, "b": 2}
    assert allot(errors, {"a": 10, "b": 10}, 2.5) == {"a": 3, "b": 2}  # 0.7 for ten bits, against 0.05
    assert allot(errors, {"a": 10, "b": 10}, 8.0) == {"a": 8, "b": 8}
    assert allot(errors, {"a": 100, "b": 1}, 2.5) == {"a": 2, "b": 8}  # one more bit of a is too much for what there is


def test_the_layer_that_shows_gets_the_bits() -> None:
    task = uneven()
    result = compress(task, Mixed(bits=4))
    bits = {layer.name: read(layer.quantizer(), "quant_max") for layer in layers(result.graph)}
    assert bits["loud"] >= 15 > bits["soft"]
    (record,) = result.records
    assert record.changes["loud"]["errors"]["2"] > 1000 * record.changes["soft"]["errors"]["2"] > 0
    x = task.calibration[0][0]
    with torch.no_grad():
        mixed, even = ((compress(task, step).graph(x) - task.original(x)).norm() for step in (Mixed(bits=4), WeightOnly(bits=4, edges=4)))
    assert mixed < 0.7 * even


@pytest.mark.parametrize("bits", [2.0, 3.3, 8.0])
def test_the_average_is_at_most_what_was_asked(bits: float) -> None:
    task = Trial(Mixed(), "resnet").task
    plan = Mixed(bits=bits, trials=8).plan(task.original.copy(), task)
    sizes = {layer.name: task.original.tensor(layer.weight).numel() for layer in layers(task.original)}
    spent = sum(sizes[name] * change["weight"]["bits"] for name, change in plan.changes.items())
    assert 0.9 * bits <= spent / sum(sizes[name] for name in plan.changes) <= bits


@pytest.mark.parametrize("options", [{"bits": 1.9}, {"bits": 8.1}, {"bits": float("nan")}, {"samples": 0}, {"rounding": "up"}], ids=str)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(StepError):
        Mixed(**options)
