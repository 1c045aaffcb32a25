"""Students that learn from each other, and networks with several outputs."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from multum import Task, compress
from multum.distill import Logits, Peers, Tasks
from multum.errors import StepError
from multum.train import loop

torch.set_num_threads(1)


def points(count: int, seed: int, wrong: float = 0.0) -> tuple[Tensor, Tensor]:
    """Two rings in a plane and which one a point is of."""
    random = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 2, (count,), generator=random)
    angle = 2 * math.pi * torch.rand(count, generator=random)
    radius = 1 + kind + 0.2 * torch.randn(count, generator=random)
    flipped = torch.rand(count, generator=random) < wrong
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), torch.where(flipped, 1 - kind, kind)


def accuracy(predict: object, data: object) -> Tensor:
    return torch.cat([100.0 * (predict(x).argmax(1) == y) for x, y in data])


def net(width: int = 16) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2))


@pytest.fixture
def task() -> Task:
    x, y = points(256, 0, wrong=0.2)
    return Task(
        net(), x[:2], train=list(zip(x.split(32), y.split(32), strict=True)), validation=[points(512, 1)],
        loss=nn.functional.cross_entropy, metric=accuracy,
    )  # fmt: skip


def test_the_best_of_the_peers_is_the_result_and_leaves_no_trace(task: Task) -> None:
    before = task.original.fingerprint()
    result = compress(task, Peers(count=3, noise=1.0, alpha=0.0, epochs=25, learning_rate=0.03))
    measured = result.records[0].measured
    assert len(measured["peers"]) == 3
    assert measured["peers"][measured["best"]] == max(measured["peers"])
    assert float(task.score(result.graph).mean()) == pytest.approx(max(measured["peers"]))
    assert max(measured["peers"]) > 80
    assert [name for name, _ in result.graph.named_tensors()] == [name for name, _ in task.original.named_tensors()]
    assert task.original.fingerprint() == before


def test_peers_come_nearer_to_each_other_than_strangers(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def apart(weight: float) -> float:
        kept = []
        monkeypatch.setattr(Peers, "_peer", lambda self, graph, seed, made=Peers._peer: kept.append(made(self, graph, seed)) or kept[-1])
        graph = compress(task.but(validation=None), Peers(noise=1.0, alpha=0.0, epochs=6, learning_rate=0.02, weight=weight)).graph
        monkeypatch.undo()
        x = points(256, 2)[0]
        pair = [kept[0].eval(), graph]
        with torch.no_grad():
            return float((torch.softmax(pair[0](x), 1) - torch.softmax(pair[1](x), 1)).abs().mean())

    near, far = apart(4.0), apart(1e-6)
    assert near < 0.7 * far


def test_peers_resumed_are_peers_unbroken(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    step = Peers(noise=1.0, epochs=3, learning_rate=0.02, augment=(), average=0.9, unfreeze=0.5)
    whole = compress(task, step).graph
    calls = []

    def cut(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 29:  # two losses a step
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(outputs, targets)

    with pytest.raises(KeyboardInterrupt):
        compress(task.but(loss=cut), step, workdir=tmp_path)
    calls.clear()
    again = compress(task.but(loss=cut), step, workdir=tmp_path).graph
    assert len(calls) == 2 * 24 - 28
    assert again.fingerprint() == whole.fingerprint()


@pytest.mark.parametrize(
    ("options", "said"), [({"count": 1}, "count 1"), ({"noise": 0.0}, "noise 0.0"), ({"baseline": True}, "labels alone")]
)
def test_peers_that_cannot_be_are_refused(task: Task, options: dict, said: str) -> None:
    with pytest.raises(StepError, match=said):
        compress(task, Peers(**options))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.kind, self.size = nn.Linear(2, 16), nn.Linear(16, 2), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.body(x))
        return {"kind": self.kind(x), "size": self.size(x)}


def losses(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "kind": nn.functional.cross_entropy(outputs["kind"], targets["kind"]),
        "size": (outputs["size"] - targets["size"]).square().mean(),
    }


@pytest.fixture
def two() -> Task:
    x, y = points(256, 0)
    size = x.norm(dim=1, keepdim=True)
    data = [(a, {"kind": b, "size": c}) for a, b, c in zip(x.split(32), y.split(32), size.split(32), strict=True)]
    return Task(Two(), x[:2], train=data, loss=losses)


def left(graph: nn.Module, task: Task) -> dict[str, float]:
    with torch.no_grad():
        rows = [losses(graph(x), y) for x, y in task.train]
    return {name: float(torch.stack([row[name] for row in rows]).mean()) for name in rows[0]}


def test_each_output_is_learned_by_its_weight(two: Task) -> None:
    how = {"alpha": 0.0, "epochs": 8, "learning_rate": 0.01}
    before = left(two.original, two)
    both, kind, size = (
        left(compress(two, Tasks(**how, outputs=outputs)).graph, two) for outputs in ((), ("size=0",), ("kind=0", "size=2"))
    )
    assert all(both[name] < 0.75 * before[name] for name in before)
    assert kind["kind"] < 0.75 * before["kind"]
    assert kind["size"] > 0.8 * before["size"]
    assert size["size"] < 0.75 * before["size"]
    assert size["kind"] > 0.8 * before["kind"]


def test_other_steps_take_the_sum_of_the_losses(two: Task) -> None:
    found = left(compress(two, Logits(alpha=0.0, epochs=8, learning_rate=0.01)).graph, two)
    before = left(two.original, two)
    assert all(found[name] < 0.75 * before[name] for name in before)


class Constant(nn.Module):
    """Outputs that no training changes, so that the variances have a known end."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.weight.T * 0 + 1.0, x @ self.weight.T * 0 + 2.0


def test_learned_weights_are_one_over_twice_the_loss() -> None:
    """exp(-s) L + s / 2 is least where exp(-s) = 1 / (2 L): by hand 1 / 2 and 1 / 8 for losses of 1 and 4."""
    x = torch.randn(64, 2)
    data = [(part, torch.zeros(8, 1)) for part in x.split(8)]
    task = Task(Constant(), x[:2], train=data, loss=lambda outputs, targets: tuple((out - targets).square().mean() for out in outputs))
    step = Tasks(alpha=0.0, uncertain=True, epochs=150, learning_rate=1e-3, optimizer="adamw")
    from multum.step import Plan

    graph = task.original.copy().requires_grad_(True)
    plan: Plan = step.plan(graph, task)
    weights = step.apply(graph, plan, task, None)["weights"]
    assert weights == {"0": pytest.approx(0.5, rel=0.05), "1": pytest.approx(0.125, rel=0.05)}
    assert [name for name, _ in graph.named_tensors()] == ["weight"]


def test_soft_labels_only_for_the_output_that_has_labels(two: Task) -> None:
    from multum.train.losses import imitations, soft_labels, squared_error

    ours, theirs = {"kind": torch.randn(4, 2), "size": torch.randn(4, 3)}, {"kind": torch.randn(4, 2), "size": torch.randn(4, 3)}
    targets = {"kind": torch.zeros(4, dtype=torch.long), "size": torch.randn(4, 3)}
    found = imitations(ours, theirs, targets, 2.0)
    torch.testing.assert_close(found["kind"], soft_labels(ours["kind"], theirs["kind"], 2.0))
    torch.testing.assert_close(found["size"], squared_error(ours["size"], theirs["size"]))


@pytest.mark.parametrize(
    ("outputs", "said"),
    [(("king=1",), "such as 'kind'"), (("kind=-1",), "gives no weight"), (("kind=0", "size=0"), "No output has a weight")],
)
def test_outputs_that_are_not_there_are_refused(two: Task, outputs: tuple[str, ...], said: str) -> None:
    with pytest.raises(StepError, match=said):
        compress(two, Tasks(outputs=outputs))


def test_one_output_needs_no_tasks(task: Task) -> None:
    with pytest.raises(StepError, match="has one output"):
        compress(task, Tasks())


def test_a_loss_that_leaves_an_output_out_is_named(two: Task) -> None:
    only = two.but(loss=lambda outputs, targets: {"kind": losses(outputs, targets)["kind"]})
    with pytest.raises(StepError, match="says nothing of the output 'size'"):
        compress(only, Tasks(alpha=0.5))


def test_a_weight_of_two_counts_twice(two: Task) -> None:
    first = [
        compress(two, Tasks(alpha=alpha, outputs=("kind=0", f"size={weight}"))).records[0].measured["loss_first"]
        for alpha in (0.0, 0.5)
        for weight in (1, 2)
    ]
    assert first[1] == pytest.approx(2 * first[0])
    assert first[3] == pytest.approx(2 * first[2])
