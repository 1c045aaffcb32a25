"""`prune.Blocks`: which branches go, and how the rest makes good."""

import json

import pytest
import torch
from torch import Tensor, nn

from multum import Recipe, Task, compress, prune
from multum.errors import StepError


class Branch(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(8, 16), nn.Linear(16, 8), scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(torch.relu(self.up(x)))


def made(*scales: float, data: bool = True) -> Task:
    torch.manual_seed(0)
    model = nn.Sequential(*(Branch(scale) for scale in scales), nn.Linear(8, 3))
    batches = [(torch.randn(32, 8), torch.zeros(32)) for _ in range(4)]
    return Task(model, batches[0][0], calibration=batches if data else None)


def gone(task: Task, **options: object) -> list[str]:
    return list(prune.Blocks(**options).plan(task.original, task).changes)


def test_the_branches_that_matter_least_go() -> None:
    task = made(3, 0.01, 2, 0.02)
    assert gone(task) == ["1.down"]
    assert gone(task, ratio=0.5) == ["1.down", "3.down"]
    assert gone(task, ratio=0.75) == ["1.down", "2.down", "3.down"]


def test_two_that_undo_each_other_go_together_or_not_at_all() -> None:
    task = made(2, 1, 1)
    with torch.no_grad():
        for layer in ("up", "down"):
            getattr(task.model[2], layer).load_state_dict(getattr(task.model[1], layer).state_dict())
        task.model[2].scale = -1.0
    assert gone(task, ratio=0.6) == ["1.down", "2.down"]


@pytest.mark.parametrize(("criterion", "expected"), [("first", [0, 1]), ("last", [2, 3]), ("alternate", [1, 3])])
def test_orders_that_need_no_data(criterion: str, expected: list[int]) -> None:
    task = made(3, 2, 1, 0.1, data=False)
    assert sorted(gone(task, ratio=0.5, criterion=criterion)) == [f"{place}.down" for place in expected]
    assert gone(task) == ["1.down"]


def test_names_choose_and_every_layer_left_has_a_reason() -> None:
    task = made(0.1, 1, 2)
    plan = prune.Blocks(exclude="0.*").plan(task.original, task)
    assert list(plan.changes) == ["1.down"]
    assert plan.changes["1.down"]["layers"] == ["1.up", "1.down"]
    assert plan.skipped == {
        "0.up": "the block of 0.down is excluded",
        "0.down": "the block of 0.down is excluded",
        "2.up": "the block of 2.down counts for more",
        "2.down": "the block of 2.down counts for more",
        "3": "it is in no residual branch",
    }
    assert json.loads(json.dumps(plan.changes)) == plan.changes


def test_the_rest_makes_good() -> None:
    task = made(1, 0.5, 1)
    (record,) = compress(task, prune.Blocks(include="1.*")).records
    assert record.measured["recovery"] == "least squares"
    assert record.measured["off_after"] < 0.5 * record.measured["off_before"]
    assert compress(task, prune.Blocks(recover=False)).records[0].measured == {}


@pytest.mark.parametrize("options", [{"ratio": 0}, {"ratio": 1.0}, {"criterion": "chang"}, {"judged": 0}, {"include": "nothing*"}])
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(StepError):
        gone(made(1, 1), **options)


def test_a_model_without_blocks_says_so() -> None:
    task = Task(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.zeros(2, 3))
    with pytest.raises(StepError, match="it is in no residual branch"):
        compress(task, prune.Blocks())
    assert Recipe.from_data([{"prune.Blocks": {"ratio": 0.5}}]).steps == (prune.Blocks(ratio=0.5),)
