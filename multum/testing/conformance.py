"""What every step must hold to, on every model. For authors of steps:

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    @pytest.mark.parametrize("name", ZOO)
    def test_conformance(check, name):
        check(Trial(MyStep(), name))

A check raises AssertionError, with what was found, when the step breaks the rule. A step that changes nothing of a model
passes when it gives a reason for every layer that it skips.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..export import to_onnx_bytes, verify
from ..graph import Graph
from ..graph.file import from_data, to_data
from ..graph.layers import KINDS
from ..step import Plan, Recipe, Step, compress
from ..task import Task, call, logits, tensors
from .zoo import ZOO

_BATCHES = 4


@dataclass(eq=False)
class Trial:
    """One step on one model of the zoo. What it computes is computed once and shared by the checks."""

    step: Step
    model: str

    @cached_property
    def task(self) -> Task:
        return task(self.model)

    @cached_property
    def teacher(self) -> str:
        """The fingerprint of the original before the step."""
        return self.task.original.fingerprint()

    @cached_property
    def plan(self) -> Plan:
        return self.step.plan(self.fresh(), self.task)

    @cached_property
    def compressed(self) -> Graph | None:
        """The graph after the step; None when it skips every layer."""
        _ = self.teacher
        if not self.plan.changes:
            assert self.plan.skipped, f"{self.step} changes nothing of {self.model} and says not why"
            return None
        return compress(self.task, self.step).graph

    def fresh(self) -> Graph:
        return self.task.original.copy().requires_grad_(True)


@lru_cache(maxsize=4)
def task(name: str) -> Task:
    """A model of the zoo as a task: random inputs, the labels that the model itself gives, cross-entropy."""
    model, example = ZOO[name]()
    inputs = [example, *(_alike(example, seed) for seed in range(1, _BATCHES))]
    with torch.no_grad():
        batches = [(batch, logits(call(model, batch)).argmax(-1)) for batch in inputs]
    return Task(model, example, train=batches, calibration=batches, validation=batches, loss=_loss, name=name)


def _alike(value: Any, seed: int, size: int | None = None) -> Any:
    """Inputs of the same structure: other normal numbers, and integers rolled along the row (ids stay valid)."""
    if isinstance(value, Tensor):
        if size is not None:
            value = value[:1].expand(size, *value.shape[1:])
        if value.is_floating_point():
            return torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
        return value.roll(seed, -1).contiguous()
    if isinstance(value, dict):
        return {key: _alike(part, seed, size) for key, part in value.items()}
    return type(value)(_alike(part, seed, size) for part in value)


def _loss(outputs: Any, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits(outputs).flatten(0, -2), targets.flatten())


def plan_is_pure(trial: Trial) -> None:
    """Planning changes neither graph nor original, and gives the same plan again."""
    before, graph = trial.teacher, trial.fresh()
    own = graph.fingerprint()
    first, second = trial.step.plan(graph, trial.task), trial.step.plan(graph, trial.task)
    assert graph.fingerprint() == own, "plan changed the graph"
    assert trial.task.original.fingerprint() == before, "plan changed the original"
    assert first == second, "two plans for one graph differ"


def plan_is_data(trial: Trial) -> None:
    """A plan is JSON, and every layer it skips has a reason."""
    plan = trial.plan
    assert json.loads(json.dumps({"changes": plan.changes, "skipped": plan.skipped})) is not None
    assert all(isinstance(reason, str) and reason for reason in plan.skipped.values()), f"a reason is empty: {plan.skipped}"


def changes_or_says_why(trial: Trial) -> None:
    """The step changes the graph, or skips with reasons; the original stays as it was."""
    before = trial.teacher
    if trial.compressed is not None:
        assert trial.compressed.fingerprint() != before, "the graph is as before"
        assert trial.compressed.find(*(target for table in KINDS.values() for target in table)), "no layer is left"
    assert trial.task.original.fingerprint() == before, "the original was changed"


def runs_with_any_batch(trial: Trial) -> None:
    """The compressed graph runs in both modes on other batch sizes; in eval mode a sample's outputs do not depend on its batch."""
    if trial.compressed is None:
        return
    graph, three = trial.compressed.copy(), _alike(trial.task.example, 1, 3)
    with torch.no_grad():
        whole = list(tensors(call(graph.eval(), three)))
        one = list(tensors(call(graph, _first(three))))
        trained = list(tensors(call(graph.train(), three)))
    for a, b, c in zip(whole, one, trained, strict=True):
        assert torch.isfinite(a).all(), "eval gives NaN or infinite values"
        assert torch.isfinite(c).all(), "train gives NaN or infinite values"
        if a.shape[1:] != b.shape[1:]:
            continue  # it compares the samples of a batch with each other, as CLIP does
        torch.testing.assert_close(a[:1], b, rtol=1e-3, atol=1e-2 * float(a.double().abs().max()))


def _first(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value[:1]
    if isinstance(value, dict):
        return {key: _first(part) for key, part in value.items()}
    return type(value)(_first(part) for part in value)


def trains(trial: Trial) -> None:
    """One step of gradient descent on the compressed graph: gradients are finite, and some weight moves."""
    if trial.compressed is None:
        return
    graph = trial.compressed.copy().requires_grad_(True).train()
    parameters = [p for p in graph.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    inputs, targets = next(iter(trial.task.data("train")))
    outputs = call(graph, inputs)
    _loss(outputs, targets).backward()  # type: ignore[no-untyped-call]
    with_gradient = [p for p in parameters if p.grad is not None]
    assert with_gradient, "no parameter gets a gradient"
    assert all(bool(torch.isfinite(p.grad).all()) for p in with_gradient if p.grad is not None), "a gradient is NaN or infinite"
    torch.optim.SGD(parameters, 0.1).step()
    assert any(not torch.equal(old, new) for old, new in zip(before, parameters, strict=True)), "no weight moves"


def survives_the_file(trial: Trial) -> None:
    """Described as data and rebuilt, the compressed graph gives the very same bits."""
    if trial.compressed is None:
        return
    data, stored = to_data(trial.compressed)
    rebuilt = from_data(json.loads(json.dumps(data)), stored)
    with torch.no_grad():
        for inputs, _ in trial.task.data("validation"):
            for a, b in zip(tensors(call(trial.compressed, inputs)), tensors(call(rebuilt, inputs)), strict=True):
                assert torch.equal(a, b), f"outputs differ by {float((a - b).abs().max()):.3g}"


def exports(trial: Trial) -> None:
    """The exported file runs and agrees with the compressed graph. Slow: seconds for each model."""
    if trial.compressed is None:
        return
    verify(trial.compressed, to_onnx_bytes(trial.compressed))


def options_return(trial: Trial) -> None:
    """The step's name and options, as a recipe on disk holds them, give the step again."""
    assert list(Recipe.from_data(json.loads(json.dumps(Recipe([trial.step]).to_data()))).flat()) == [trial.step]


Check = Callable[[Trial], None]
CHECKS: Sequence[Check] = (plan_is_pure, plan_is_data, options_return, changes_or_says_why, runs_with_any_batch, trains, survives_the_file)
SLOW_CHECKS: Sequence[Check] = (exports,)
