"""What `Static` does when it loses too much: repairs first, then more bits where they are missed, then layers in float; it says which."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ..graph import Graph, layers
from ..graph.watch import Watch
from ..step import Plan
from ..task import Task, calibration, call, labels, tensors
from .equalize import Equalize
from .grid import Grid, quantize, signed
from .insert import weight_scale

REPAIRS = ("ranges", "smooth")  # methods of Equalize
_SHARES = (0.125, 0.25, 0.5, 1.0)  # of the layers, those that hurt most first
_TRIALS = 32  # samples on which it is tried how much each layer hurts
_JUDGED = 512  # samples on which networks are compared where there are no validation data
NOTE = "all layers"  # where the plan says what was chosen
WHOLE = 8  # bits to which weights are raised


@dataclass(frozen=True)
class Choice:
    """One way to quantize: a repair that comes first, layers whose weights have `WHOLE` bits, layers that stay in float."""

    repair: str = ""
    raised: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def prepare(self, graph: Graph, task: Task, samples: int) -> None:
        """Carries out the repair, in place."""
        if self.repair:
            step = Equalize(self.repair, insert=self.repair == "smooth", samples=samples)
            if (plan := step.plan(graph, task)).changes:
                step.apply(graph, plan, task, None)

    def to_data(self) -> dict[str, Any]:
        """What differs from quantizing as asked."""
        return {key: value for key, value in (("repair", self.repair), ("raised", [*self.raised]), ("kept", [*self.kept])) if value}


def within(
    max_drop: float,
    graph: Graph,
    task: Task,
    ready: Callable[[Choice], Graph],
    plan: Callable[[Choice], Plan],
    make: Callable[[Choice, Plan], Graph],
) -> Plan:
    """The plan of the first choice, from the cheapest on, that loses at most `max_drop`; else of the one that loses least.

    What is lost is the task's score on its validation data; without such, agreement with the graph on calibration data, in percent.
    `ready` gives the float network that a choice quantizes, `plan` and `make` how and what becomes of it.
    """
    tried = list[tuple[float, Choice, Plan]]()
    before = _validated(graph, task) if task.has("validation") else 0.0

    def fits(choice: Choice) -> bool:
        planned = plan(choice)
        made = make(choice, planned)
        sign = 1 if task.higher_is_better else -1
        lost = sign * (before - _validated(made, task)) if task.has("validation") else _disagreement(graph, made, task)
        tried.append((lost, choice, planned))
        return lost <= max_drop

    if not fits(Choice()) and not any(fits(Choice(repair)) for repair in REPAIRS):
        _, best, planned = min(tried, key=lambda row: row[0])
        worst = worst_first(ready(best), planned, task)
        coarse = [name for name in worst if planned.changes[name].get("weight", {}).get("bits", WHOLE) < WHOLE]
        further = [Choice(best.repair, names) for names in _heads(coarse, _SHARES)]
        further += [Choice(best.repair, tuple(coarse), names) for names in _heads(worst, _SHARES[:-1])]
        any(fits(choice) for choice in further)
    lost, choice, planned = min(tried, key=lambda row: row[0]) if tried[-1][0] > max_drop else tried[-1]
    steps = [{**one.to_data(), "drop": round(drop, 4)} for drop, one, _ in tried]
    note = {"drop": lost, "met": lost <= max_drop, "tried": steps, **choice.to_data()}
    return Plan({**planned.changes, NOTE: {"choice": note}}, planned.skipped)


def _heads(names: list[str], shares: Sequence[float]) -> list[tuple[str, ...]]:
    """The first names, as many as these shares of all, at least one each."""
    return [tuple(names[: max(1, round(share * len(names)))]) for share in shares if names]


def choice_of(plan: Plan) -> Choice:
    """The choice that a plan of `within` was made for."""
    note = plan.changes.get(NOTE, {}).get("choice", {})
    return Choice(note.get("repair", ""), tuple(note.get("raised", ())), tuple(note.get("kept", ())))


@torch.inference_mode()
def worst_first(graph: Graph, plan: Plan, task: Task) -> list[str]:
    """The planned layers, first those whose rounded weights and inputs, one layer at a time, change the outputs most."""
    known = {layer.name: layer for layer in layers(graph) if layer.name in plan.changes}
    nodes = {node.name: node for node in graph.fx.nodes}
    output = next(node for node in graph.fx.nodes if node.op == "output")
    hurt = dict.fromkeys(known, 0.0)
    for inputs in calibration(task, _TRIALS):
        right = [value for value in tensors(call(graph, inputs)) if value.is_floating_point()]
        for name, layer in known.items():
            change, kept = plan.changes[name], graph.tensor(layer.weight).detach()
            entry = change.get("input")
            values = {nodes[entry["value"]]: entry} if entry and entry["value"] in nodes else {}
            if "weight" in change:
                grid = signed(change["weight"]["bits"], layer.scale_axis)
                scale = weight_scale(kept, grid)
                graph.set_tensor(layer.weight, quantize(kept, scale, torch.zeros_like(scale), grid))
            seen = list[Tensor]()
            Watch(graph, [*values, output], partial(_round, values, seen))(inputs)
            graph.set_tensor(layer.weight, kept)
            hurt[name] += sum(float((a - b).double().square().sum()) for a, b in zip(seen, right, strict=True))
    return sorted(hurt, key=lambda name: -hurt[name])


def _round(values: Mapping[fx.Node, Mapping[str, Any]], seen: list[Tensor], node: fx.Node, value: Any) -> Any:
    if node.op == "output":
        seen.extend(part for part in tensors(value) if part.is_floating_point())
        return None
    entry = values[node]
    return quantize(value, torch.tensor(entry["scale"]), torch.tensor(float(entry["zero_point"])), Grid(entry["low"], entry["high"]))


def _validated(graph: Graph, task: Task) -> float:
    return float(np.mean(task.score(partial(call, graph.eval()), "validation")))


@torch.inference_mode()
def _disagreement(graph: Graph, made: Graph, task: Task) -> float:
    """The share of the calibration samples, in percent, whose likeliest class differs."""
    differ = [labels(call(graph, inputs)) != labels(call(made, inputs)) for inputs in calibration(task, _JUDGED)]
    return 100.0 * float(torch.cat([part.flatten() for part in differ]).double().mean())
