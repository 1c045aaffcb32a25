"""`prune.Weights` and `prune.NM`: how many zeros, where, and that they stay."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import multum
from multum import Recipe, Task, compress, distill, prune, quantize
from multum.analyze.evidence import Evidence
from multum.errors import StepError
from multum.export import to_onnx_bytes, verify
from multum.prune.criteria import CRITERIA
from multum.prune.obs import SURGEONS
from multum.step import Plan

CONV, LINEAR = "0.weight", "4.weight"


def make(**options: Any) -> Task:
    torch.manual_seed(0)
    body = (nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 6))
    data = [(torch.randn(16, 4, 3, 3), torch.randint(0, 6, (16,))) for _ in range(4)]
    model = nn.Sequential(*body)
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    return Task(model, data[0][0], **({"train": data, "loss": nn.functional.cross_entropy} | options))


@pytest.fixture(scope="module")
def task() -> Task:
    return make()


@pytest.fixture(scope="module")
def bare() -> Task:
    return make(train=None, loss=None)


def zeros(plan: Plan) -> dict[str, int]:
    return {name: change["zeros"] for name, change in plan.changes.items()}


def plan(task: Task, **options: Any) -> Plan:
    return prune.Weights(**options).plan(task.original, task)


def test_shares_of_the_network_and_of_every_layer(bare: Task) -> None:
    assert zeros(plan(bare, ratio=0.25, allocation="uniform")) == {"0": 72, "4": 108}
    for criterion in (None, "l1", "l2", "random"):
        assert abs(sum(zeros(plan(bare, ratio=0.25, criterion=criterion)).values()) - 180) <= 1


@given(st.floats(0.01, 0.99), st.floats(0, 0.9), st.sampled_from(["l1", "lamp", "random"]), st.sampled_from(["global", "uniform"]))
@settings(max_examples=25, deadline=None)
def test_no_layer_falls_below_its_floor(ratio: float, floor: float, criterion: str, allocation: str) -> None:
    bare = make(train=None)
    for change in plan(bare, ratio=ratio, floor=floor, criterion=criterion, allocation=allocation).changes.values():
        assert change["of"] - change["zeros"] >= max(1, math.ceil(floor * change["of"]))


def test_a_threshold_is_of_the_score_or_of_the_mean_of_a_layer(bare: Task) -> None:
    weights = {name: bare.original.tensor(f"{name}.weight") for name in ("0", "4")}
    assert zeros(plan(bare, threshold=0.05)) == {name: int((w.abs() < 0.05).sum()) for name, w in weights.items()}
    relative = zeros(plan(bare, threshold=0.5, allocation="uniform"))
    assert relative == {name: int((w.abs() < 0.5 * w.abs().double().mean()).sum()) for name, w in weights.items()}


def test_a_probability_is_that_of_each_weight(bare: Task) -> None:
    found = zeros(plan(bare, probability=0.3))
    assert found == zeros(plan(bare, probability=0.3))
    assert 0.2 < sum(found.values()) / 720 < 0.4


def test_the_gradient_with_a_threshold_for_each_layer(task: Task) -> None:
    """What the loss pulls at stays, as it is; the rest goes; nothing is trained."""
    step = prune.Weights(criterion="gradient", threshold=1.0, allocation="uniform", recover=False)
    graph = compress(task, step).graph
    pulls = Evidence(task.original, task).gradients[LINEAR].abs().double()
    kept = pulls >= pulls.mean()
    assert torch.equal(graph.tensor(LINEAR), task.original.tensor(LINEAR) * kept)


@pytest.mark.parametrize("criterion", [*CRITERIA, *SURGEONS])
def test_every_criterion_sets_as_many_to_zero_as_planned(task: Task, criterion: str) -> None:
    for recovers in (False, True):
        result = compress(task, prune.Weights(ratio=0.6, criterion=criterion, recover=recovers, samples=32))
        for name, change in result.records[0].changes.items():
            assert int((result.graph.tensor(f"{name}.weight") == 0).sum()) == change["zeros"]


def test_without_recovery_the_others_stay_as_they_were(task: Task) -> None:
    graph = compress(task, prune.Weights(ratio=0.3, criterion="l1", recover=False)).graph
    for name in (CONV, LINEAR):
        old, new = task.original.tensor(name), graph.tensor(name)
        assert torch.equal(new[new != 0], old[new != 0])
        assert old[new == 0].abs().max() <= old[new != 0].abs().min()


@pytest.mark.parametrize("criterion", ["l1", "obs", "sparsegpt"])
def test_recovery_brings_the_outputs_nearer(task: Task, criterion: str) -> None:
    def error(**options: Any) -> float:
        graph = compress(task, prune.Weights(ratio=0.5, allocation="uniform", **options)).graph
        return sum(float((graph(x) - task.original(x)).square().mean()) for x, _ in task.train)

    with torch.no_grad():
        assert error(criterion=criterion) < 0.5 * error(criterion="l1", recover=False)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x)))


def test_a_tied_weight_goes_once_and_is_not_refitted_for_one_of_its_uses() -> None:
    ids = torch.randint(0, 12, (4, 5))
    task = Task(Tied(), ids, train=[(ids, ids)])
    result = compress(task, prune.Weights(ratio=0.5))
    (name,) = result.graph.sparse
    old, new = task.original.tensor(name), result.graph.tensor(name)
    assert int((new == 0).sum()) == 48
    assert torch.equal(new[new != 0], old[new != 0])
    assert list(result.records[0].skipped.values()) == ["its weight is that of embedding"]
    excluded = prune.Weights(exclude="head").plan(task.original, task)
    assert "shares its weight with head" in excluded.skipped["embedding"]


def test_zeros_stay_through_training_rounding_the_file_and_the_export(task: Task, tmp_path: Path) -> None:
    recipe = Recipe(
        [
            prune.Weights(ratio=0.7),
            distill.Logits(epochs=1.0, learning_rate=1e-2),
            quantize.WeightOnly(bits=4),
            distill.Logits(epochs=1.0, learning_rate=1e-2),
            quantize.Static(samples=32),
            quantize.Half(),
        ]
    )
    first = compress(task, recipe.steps[0]).graph
    holes = {name: first.tensor(name) == 0 for name in (CONV, LINEAR)}
    result = compress(task, recipe)
    graph = result.graph
    multum.save(result, tmp_path / "small.mip", task)
    loaded = multum.load(tmp_path / "small.mip")
    for name, hole in holes.items():
        assert not graph.tensor(name)[hole].any()
        assert not loaded.tensor(name)[hole].any()
        assert graph.tensor(name)[~hole].any()
    assert loaded.sparse == graph.sparse == {CONV, LINEAR}
    verify(graph, to_onnx_bytes(graph))


def test_a_loop_of_the_users_own_keeps_the_zeros_too() -> None:
    def own(graph: Any, loss: Any) -> None:
        optimizer = torch.optim.AdamW(graph.parameters(), 1e-2)
        for x, y in task.train:
            optimizer.zero_grad()
            loss(x, graph(x), y).backward()
            optimizer.step()

    task = make(fit=own)
    first = compress(task, prune.Weights(ratio=0.7)).graph
    graph = compress(task, [prune.Weights(ratio=0.7), distill.Logits()]).graph
    assert torch.equal(graph.tensor(CONV) == 0, first.tensor(CONV) == 0)
    assert not torch.equal(graph.tensor(CONV), first.tensor(CONV))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (prune.Weights, {"ratio": 0.0}, "between 0 and 1"),
        (prune.Weights, {"ratio": 1.0}, "between 0 and 1"),
        (prune.Weights, {"ratio": -0.1}, "between 0 and 1"),
        (prune.Weights, {"criterion": "wand"}, "'wanda'"),
        (prune.Weights, {"allocation": "local"}, "global or uniform"),
        (prune.Weights, {"floor": 1.0}, "floor from 0"),
        (prune.Weights, {"probability": 1.5}, "probability between"),
        (prune.Weights, {"probability": 0.5, "criterion": "l1"}, "one of the two"),
        (prune.Weights, {"samples": 0}, "at least 1"),
        (prune.NM, {"pattern": "2:2"}, "fewer kept"),
        (prune.NM, {"pattern": "0:4"}, "no pattern"),
        (prune.NM, {"pattern": "two of four"}, "no pattern"),
        (prune.NM, {"pattern": "1x1"}, "no pattern"),
        (prune.NM, {"ratio": 1.0}, "between 0 and 1"),
        (prune.NM, {"criterion": "l7"}, "'l1'|'l2'"),
        (prune.NM, {"samples": 0}, "at least 1"),
    ],
)
def test_options_that_make_no_sense_say_what_would(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(StepError, match=message):
        kind(**options)


@pytest.mark.parametrize("kind", [prune.Weights, prune.NM])
def test_patterns_that_match_nothing_and_data_that_are_missing(bare: Task, kind: Any) -> None:
    with pytest.raises(StepError, match="matches no layer"):
        compress(bare, kind(include="conv*"))
    needs = {"taylor": "train", "fisher": "train", "gradient": "train", "obs": "calibration", "wanda": "calibration"}
    for criterion, need in needs.items():
        with pytest.raises(StepError, match=f"needs `{need}`"):
            compress(bare, kind(criterion=criterion))
    unlabelled = make(loss=None)
    with pytest.raises(StepError, match="needs `loss`"):
        compress(unlabelled, kind(criterion="taylor"))


@pytest.mark.parametrize("criterion", [None, "l1", "sparsegpt", "wanda"])
@pytest.mark.parametrize(("pattern", "kept", "every"), [("2:4", 2, 4), ("1:4", 1, 4), ("3:4", 3, 4)])
def test_n_of_m_neighbouring_inputs(task: Task, pattern: str, kept: int, every: int, criterion: str | None) -> None:
    graph = compress(task, prune.NM(pattern=pattern, criterion=criterion)).graph
    for name in (CONV, LINEAR):
        weight = graph.tensor(name)
        inputs_last = weight.reshape(*weight.shape[:2], -1).movedim(1, -1).reshape(-1, every)
        assert ((inputs_last != 0).sum(1) == kept).all()


@pytest.mark.parametrize("criterion", ["l1", "obs", "sparsegpt"])
def test_whole_blocks(task: Task, criterion: str) -> None:
    graph = compress(task, prune.NM(pattern="4x1", ratio=0.75, criterion=criterion, include="0")).graph
    blocks = (graph.tensor(CONV) != 0).reshape(2, 4, 4, 9)  # outputs / 4, outputs of a block, inputs, places in the window
    assert torch.equal(blocks.all(1), blocks.any(1))
    assert int(blocks.all(1).sum()) == 2 * 4 * 9 // 4


def test_patterns_that_do_not_fit_a_layer_are_skipped_with_the_reason(bare: Task) -> None:
    found = prune.NM(pattern="4:8").plan(bare.original, bare)
    assert list(found.changes) == ["4"]
    assert found.skipped == {"0": "its 4 input channels are no multiple of 8"}
    blocks = prune.NM(pattern="4x3").plan(bare.original, bare)
    assert "do not divide into blocks" in blocks.skipped["4"]
    assert json.loads(json.dumps(found.changes)) == found.changes
