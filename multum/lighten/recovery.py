"""Training of blocks toward the hidden values of what they took the place of, one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from ..graph import Graph, layers
from ..graph.model import aten
from ..task import Task
from ..train import Companion, Teacher, Training, fit
from ..train.losses import squared_error

_FOLLOWS = (aten.batch_norm.default, aten.relu.default, aten.hardtanh.default, aten.hardswish.default, aten.silu.default, aten.gelu.default)


class _Turns(Companion):
    """How many of the blocks have had their turn, from one to all."""

    key = "turns"

    def __init__(self, count: int):
        self.count, self.now = count, 1

    def before(self, step: int, steps: int) -> None:
        self.now = min(self.count, 1 + step * (self.count + 1) // max(1, steps))


def recover_blocks(
    graph: Graph, before: Graph, ends: Mapping[str, tuple[fx.Node, list[str]]], task: Task, epochs: float, rate: float, workdir: Path | None
) -> dict[str, Any]:
    """Trains the parameters of blocks, and of the normalizations behind them, toward what `before` has there; in place.

    `ends` has for each layer that was replaced the last operator of its block and the names of its parameters, in order of execution. One
    block joins after the other, those before go on; the last part of the steps is for all. Hidden values are compared behind the
    normalization and the activation that follow, by their squared error relative to their mean square.
    """
    names = {node.name: node for node in before.fx.nodes}
    nodes = {layer.name: layer.node for layer in layers(before) if layer.name in ends}
    ours, theirs, trained = list[fx.Node](), list[fx.Node](), set[str]()
    for layer, (end, parameters) in ends.items():
        trained |= set(parameters)
        node, twin = end, nodes[layer]
        while len(node.users) == 1 and (after := next(iter(node.users))).target in _FOLLOWS and after.name in names:
            trained |= {str(given.target) for given in after.all_input_nodes if given.op == "get_attr"}
            node, twin = after, names[after.name]
        ours.append(node)
        theirs.append(twin)
    teacher, turns = Teacher(before, theirs), _Turns(len(ours))

    def loss(inputs: Any, outputs: Any, targets: Any) -> Tensor:
        teacher(inputs, targets)
        terms = [squared_error(a, b) for a, b in list(zip(graph.tapped, teacher.hidden, strict=True))[: turns.now]]
        return sum(terms[1:], terms[0])

    flags = {name: parameter.requires_grad for name, parameter in graph.tensors.named_parameters()}
    for name, parameter in graph.tensors.named_parameters():
        parameter.requires_grad_(name in trained and parameter.is_floating_point())
    graph.tap(ours)
    try:
        return fit(graph, task, loss, Training(epochs=epochs, learning_rate=rate), workdir, [turns])
    finally:
        graph.tap()
        for name, parameter in graph.tensors.named_parameters():
            parameter.requires_grad_(flags[name])
