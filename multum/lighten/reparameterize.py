"""Branches that are there for training alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..errors import StepError, near
from ..graph import Graph, Layer, select
from ..graph.matrix import data
from ..graph.model import aten, read, shape
from ..step import Plan, Stage, Step, option
from ..task import Task
from ..train import OPTIMIZER, Training, recover
from .affine import plain_layers
from .blocks import form, shape_of
from .merge import merge

_NAMES = ("repvgg", "acb", "dbb")


@dataclass(frozen=True)
class Reparameterize(Step):
    """Trains with branches beside each convolution, then merges them into it: it costs what it did, and has learned with more.

    `repvgg`: a 1x1 convolution and the input itself (Ding et al. 2021); `acb`: windows of 1 x k and k x 1 (Ding et al. 2019); `dbb`: a 1x1
    convolution, one before a whole window and one before an average (Ding et al. 2021, "Diverse branch block"). Each has a batch norm
    whose scale begins at zero, so that the network begins as it was. Training is toward the original and the labels, as in
    `distill.Logits`. With `merge` off, or `epochs` 0, the branches stay until `lighten.Merge`.
    """

    stage: ClassVar[Stage | None] = Stage.STRUCTURE

    branches: str = option("repvgg", f"one of {', '.join(_NAMES)}")
    epochs: float = option(1.0, "passes over the training data; 0: only puts the branches in")
    learning_rate: float | None = option(None, "highest learning rate; found from the graph when not given")
    optimizer: str = option("adamw", OPTIMIZER)
    merge: bool = option(True, "merge the branches after the training")
    include: str | tuple[str, ...] = option("*", "convolutions that get branches, as glob patterns")
    exclude: str | tuple[str, ...] = option((), "those that get none")

    def __post_init__(self) -> None:
        Training(optimizer=self.optimizer)  # which refuses what it does not know
        if self.branches not in _NAMES:
            raise StepError(
                f"lighten.Reparameterize: branches is {self.branches!r}.",
                f"one of {', '.join(_NAMES)}, such as {near(self.branches, _NAMES)}",
            )
        if self.epochs < 0:
            raise StepError(f"lighten.Reparameterize: epochs is {self.epochs}.", "0 or more")

    def requires(self) -> tuple[str, ...]:
        return ("train",) if self.epochs else ()

    def plan(self, graph: Graph, task: Task) -> Plan:
        plain, changes, skipped = plain_layers(graph), dict[str, dict[str, Any]](), dict[str, str]()
        for layer in select(graph, self.include, self.exclude):
            reason = "it is no convolution with a weight of its own" if layer.kind != "conv" or layer.node not in plain else _reason(layer)
            if reason:
                skipped[layer.name] = reason
            else:
                changes[layer.name] = {"branches": self.branches, "identity": self.branches == "repvgg" and _keeps(layer)}
        return Plan(changes, skipped)

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        named, random = set(plan.changes), torch.Generator().manual_seed(task.seed)
        for layer in [layer for layer in plain_layers(graph).values() if layer.name in plan.changes]:
            named |= expand(graph, layer, self.branches, random)
        graph.clean()
        with torch.no_grad():
            graph.refresh()
        if not self.epochs:
            return {}
        measured = recover(graph, task, Training.of(graph, self.learning_rate, self.optimizer, epochs=self.epochs), workdir)
        if self.merge:
            merge(graph, named)
        return measured


def expand(graph: Graph, layer: Layer, branches: str, random: torch.Generator) -> set[str]:
    """Adds branches to a convolution, behind its batch norm if it has one; gives the names of the layers that are new."""
    site, window = _Site(graph, layer, random), shape_of(layer)
    known, dims, source = site.form, len(window), site.source
    one, none, names = [1] * dims, [0] * dims, list[str]()
    inside = [pad - step * (size - 1) // 2 for pad, step, size in zip(known["padding"], known["dilation"], window, strict=True)]
    if branches == "acb":
        made = []
        for dim in range(dims):
            size, padding = list(one), list(inside)
            size[dim], padding[dim] = window[dim], known["padding"][dim]
            names.append(f"line{dim}")
            made.append(site.norm(names[-1], site.conv(names[-1], source, size, known["stride"], padding, site.groups)))
    else:
        names.append("point")
        made = [site.norm("point", site.conv("point", source, one, known["stride"], inside, site.groups))]
    if branches == "repvgg" and _keeps(layer):
        made.append(site.norm("input", source))
    if branches == "dbb" and site.groups == 1:
        names += ["first", "second"]
        before = site.conv("first", source, one, one, none, 1)
        made.append(site.norm("second", site.conv("second", before, list(window), known["stride"], known["padding"], 1)))
        if set(known["dilation"]) == {1}:
            names.append("averaged")
            args = (site.conv("averaged", source, one, one, none, 1), list(window), known["stride"], known["padding"])
            made.append(site.norm("averaged", site.add(getattr(aten, f"avg_pool{dims}d").default, args)))
    total, users = site.end, [user for user in site.end.users if user not in made]
    for branch in made:
        total = site.add(aten.add.Tensor, (total, branch))
    for user in users:
        user.replace_input_with(site.end, total)
    return {f"{site.base}.{name}" for name in names}


class _Site:
    """Where branches come in: beside a convolution and the batch norm behind it."""

    def __init__(self, graph: Graph, layer: Layer, random: torch.Generator):
        known, follows = form(layer), next(iter(layer.node.users))
        assert known is not None
        normed = len(layer.node.users) == 1 and follows.target is aten.batch_norm.default
        self.graph, self.layer, self.random, self.form = graph, layer, random, known
        self.end, self.source, self.groups = follows if normed else layer.node, data(layer), int(read(layer.node, "groups"))
        self.place, self.base, self.weight = self.end.next, layer.weight.removesuffix(".weight"), graph.tensor(layer.weight)

    def add(self, target: Any, args: tuple[Any, ...]) -> fx.Node:
        node = self.graph.operator(target, args, self.end, self.place)
        node.meta["module"] = self.layer.node.meta.get("module", "")
        return node

    def own(self, name: str, value: Tensor, parameter: bool = True) -> fx.Node:
        self.graph.set_tensor(f"{self.base}.{name}", value.to(self.weight), parameter)
        return self.graph.attribute(f"{self.base}.{name}", self.place)

    def conv(self, name: str, value: fx.Node, size: list[int], stride: list[int], padding: list[int], groups: int) -> fx.Node:
        outputs = len(self.weight)
        fan = self.weight.shape[1] if value is self.source else outputs
        fresh = torch.randn(outputs, fan, *size, generator=self.random) * (2 / (fan * math.prod(size))) ** 0.5
        dilation = [step if span > 1 else 1 for step, span in zip(self.form["dilation"], size, strict=True)]
        args = (value, self.own(f"{name}.weight", fresh), None, stride, padding, dilation, groups)
        return self.add(getattr(aten, f"conv{len(size)}d").default, args)

    def norm(self, name: str, value: fx.Node) -> fx.Node:
        zeros, ones = torch.zeros(len(self.weight)), torch.ones(len(self.weight))
        tensors = {"scale": zeros, "shift": zeros, "mean": zeros, "variance": ones}
        given = [self.own(f"{name}_norm.{part}", start, part in ("scale", "shift")) for part, start in tensors.items()]
        return self.add(aten.batch_norm.default, (value, *given, False, 0.1, 1e-5, True))


def _keeps(layer: Layer) -> bool:
    """Whether what the layer reads has the form of what it gives, place by place."""
    known = form(layer)
    return known is not None and shape(data(layer))[1:] == shape(layer.node)[1:] and set(known["stride"]) == {1}


def _reason(layer: Layer) -> str | None:
    known, window = form(layer), shape_of(layer)
    assert known is not None
    if max(window) == 1:
        return "its window is a point"
    for size, step, padding in zip(window, known["dilation"], known["padding"], strict=True):
        if size % 2 == 0 or padding < step * (size - 1) // 2:
            return "the middle of its window does not lie over its input's places"
    return None
