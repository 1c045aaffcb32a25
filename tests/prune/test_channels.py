"""`prune.Channels`: how many channels, which ones, which not and why."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multum import Recipe, Task, compress, prune
from multum.errors import StepError
from multum.graph.axes import axes
from multum.graph.surgery import cut
from multum.prune import counts
from multum.step import Plan

IMAGES = torch.zeros(2, 3, 8, 8)


class Network(nn.Module):
    """A stem, one residual block, and a head; widths 32 and 64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.wide, self.back, self.head = nn.Conv2d(32, 64, 1), nn.Conv2d(64, 32, 1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head((x + self.back(torch.relu(self.wide(x)))).mean((2, 3)))


@pytest.fixture(scope="module")
def task() -> Task:
    return Task(Network(), IMAGES)


def plan(task: Task, **options: Any) -> Plan:
    return prune.Channels(**options).plan(task.original, task)


def widths(plan: Plan) -> dict[str, int]:
    return {name: len(change["keep"]) for name, change in plan.changes.items()}


def test_half_of_every_group_by_default_and_a_reason_for_every_layer_left(task: Task) -> None:
    made = plan(task)
    assert widths(made) == {"stem:out": 16, "wide:out": 32}
    assert {name: change["of"] for name, change in made.changes.items()} == {"stem:out": 32, "wide:out": 64}
    assert made.skipped == {"head": "it is an output of the model"}


def test_planning_is_pure_and_plain_data(task: Task) -> None:
    before = task.original.fingerprint()
    made = plan(task)
    assert json.loads(json.dumps(made.changes)) == made.changes
    assert made == plan(task)
    assert task.original.fingerprint() == before


def test_the_channels_with_the_largest_weights_stay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [4.0], [2.0], [3.0]]).expand(4, 3))
        model[2].weight.fill_(1)
    made = plan(Task(model, torch.zeros(2, 3)), ratio=0.5)
    assert made.changes == {"0:out": {"keep": [1, 3], "of": 4}}


@pytest.mark.parametrize(
    ("ratio", "multiple", "expected"),
    [(0.4, 8, (16, 40)), (0.4, 1, (19, 38)), (0.4, 16, (16, 32)), (0.1, 8, (56,)), (0.9, 8, (8, 8)), (0.4, 64, (16, 32))],
)
def test_widths_are_multiples_that_are_no_coarser_than_a_quarter_of_the_group(
    task: Task, ratio: float, multiple: int, expected: tuple[int, ...]
) -> None:
    assert tuple(widths(plan(task, ratio=ratio, multiple=multiple)).values()) == expected


def test_a_threshold_cuts_in_each_group_what_scores_below_it(task: Task) -> None:
    """By the norm of the gradient, which here is 2, 4 and 12 with the mean 6, without training."""
    model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(0)
        model[1].weight.copy_(torch.tensor([[1.0, 2.0, 6.0]]))
    one = torch.ones(2, 1)
    data = Task(model, one, train=[(one, one)], loss=nn.functional.mse_loss)
    for threshold, left in ((0.3, [0, 1, 2]), (0.5, [1, 2]), (0.9, [2]), (9.0, [2])):
        keep = plan(data, criterion="gradient", threshold=threshold, multiple=1).changes.get("0:out", {"keep": [0, 1, 2]})["keep"]
        assert keep == left
    with pytest.raises(StepError, match="needs `train`"):
        compress(task, prune.Channels(criterion="gradient", threshold=0.5))


def test_the_floor_is_kept(task: Task) -> None:
    assert widths(plan(task, ratio=0.95, multiple=1, floor=0.3)) == {"stem:out": 10, "wide:out": 20}
    assert widths(plan(task, ratio=0.99, multiple=1, floor=0.0)) == {"stem:out": 1, "wide:out": 1}


def test_patterns_choose_and_what_goes_together_is_left_out_together(task: Task) -> None:
    only = plan(task, include="wide")
    assert set(only.changes) == {"wide:out"}
    assert only.skipped["stem"] == only.skipped["back"] == "include does not name it"
    without = plan(task, exclude=("back",))
    assert set(without.changes) == {"wide:out"}
    assert without.skipped["stem"] == "back is excluded"


def test_global_allocation_cuts_where_scores_are_low(task: Task) -> None:
    graph = task.original.copy()
    graph.tensor("wide.weight")[:40] *= 1e-3
    graph.tensor("back.weight")[:, :40] *= 1e-3
    made = prune.Channels(ratio=0.42, allocation="global", multiple=1).plan(graph, task)
    assert made.changes["wide:out"]["keep"] == list(range(40, 64))
    assert len(made.changes.get("stem:out", {"keep": range(32)})["keep"]) > 28


@pytest.mark.parametrize("share", [0.8, 0.5, 0.2])
def test_a_share_of_parameters_is_met_by_real_counts_and_barely(task: Task, share: float) -> None:
    step = prune.Channels(parameters=share, multiple=1)
    result = compress(task, step)
    before, after = result.records[0].parameters
    assert share - 0.06 < after / before <= share


def test_a_share_of_multiply_accumulates_is_met(task: Task) -> None:
    made = plan(task, macs=0.5, multiple=1)
    keep = {name: change["keep"] for name, change in made.changes.items()}
    groups = axes(task.original)
    share = counts.macs(task.original, groups, keep) / counts.macs(task.original, groups, {})
    assert 0.44 < share <= 0.5


def test_counts_by_hand_and_as_cut(task: Task) -> None:
    groups, keep = axes(task.original), {"stem:out": list(range(8)), "wide:out": list(range(10))}
    # stem 3x3x3x32 on 8x8, wide 32x64 and back 64x32 on 8x8, head 32x5; two images
    assert counts.macs(task.original, groups, {}) == 2 * (64 * (27 * 32 + 32 * 64 + 64 * 32) + 32 * 5)
    assert counts.macs(task.original, groups, keep) == 2 * (64 * (27 * 8 + 8 * 10 + 10 * 8) + 8 * 5)
    graph = task.original.copy()
    cut(graph, keep)
    assert counts.parameters(task.original, groups, keep) == sum(p.numel() for p in graph.parameters())


def test_transposed_and_recurrent_layers_count_what_they_multiply() -> None:
    upsample = Task(nn.ConvTranspose2d(3, 4, 2, 2), IMAGES).original
    assert counts.macs(upsample, axes(upsample), {}) == 2 * 64 * 3 * 4 * 4
    recurrent = Task(nn.LSTM(3, 5, batch_first=True), torch.zeros(2, 7, 3)).original
    assert counts.macs(recurrent, axes(recurrent), {}) == 2 * 7 * 4 * 5 * (3 + 5)


class Heads(nn.Module):
    def __init__(self, heads: int, depth: int) -> None:
        super().__init__()
        self.heads, self.depth, width = heads, depth, heads * depth
        self.q, self.k, self.v, self.out = (nn.Linear(6, width), nn.Linear(6, width), nn.Linear(6, width), nn.Linear(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], self.heads, self.depth).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("heads", "depth", "ratio", "expected"),
    [
        (4, 8, 0.5, {"q:out[0]": 2}),  # whole heads
        (4, 8, 0.25, {"q:out[0]": 3}),
        (2, 16, 0.25, {"q:out[1]": 12, "v:out[1]": 12}),  # half of the heads would be too many
        (1, 16, 0.5, {"q:out": 8, "v:out": 8}),
    ],
)
def test_heads_are_cut_or_their_width_never_both(heads: int, depth: int, ratio: float, expected: dict[str, int]) -> None:
    made = plan(Task(Heads(heads, depth), torch.zeros(2, 5, 6)), ratio=ratio)
    assert widths(made) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "between 0 and 1"),
        ({"ratio": 1.0}, "between 0 and 1"),
        ({"criterion": "magnitud"}, "'magnitude'"),
        ({"allocation": "local"}, "uniform, global"),
        ({"multiple": -1}, "at least 1"),
        ({"floor": 1.0}, "floor from 0"),
        ({"parameters": 10.0}, "parameters between 0 and 1"),
        ({"macs": 0.0}, "macs between 0 and 1"),
        ({"threshold": 0.0}, "a number above 0"),
        ({"threshold": 0.5, "macs": 0.5}, "one of the two"),
        ({"include": "stm"}, "'stem'"),
        ({"exclude": ("haed",)}, "'head'"),
    ],
)
def test_options_that_make_no_sense_say_what_would(task: Task, options: dict[str, Any], message: str) -> None:
    with pytest.raises(StepError, match=message):
        plan(task, **options)


def test_nothing_to_cut_is_an_error_with_the_reasons() -> None:
    with pytest.raises(StepError, match="0: it is an output of the model"):
        compress(Task(nn.Sequential(nn.Linear(3, 4)), torch.zeros(2, 3)), prune.Channels())


def test_the_step_is_found_by_name_and_comes_back_from_data() -> None:
    step = prune.Channels(ratio=0.3, exclude=("stem",), parameters=0.5)
    assert Recipe.from_data(Recipe([step]).to_data()).steps == (step,)
