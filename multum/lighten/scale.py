"""A network made smaller in all its dimensions at once: width, depth, and the resolution of what it sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, fx

from ..analyze import analyze
from ..errors import StepError
from ..graph import Graph, layers, surgery
from ..graph.axes import Group, Groups, axes
from ..graph.model import aten, shape
from ..graph.residual import Block, blocks, skip
from ..step import Plan, Stage, Step, option
from ..task import Task, call, tensors

_MULTIPLE = 8  # widths are multiples of this, in small layers of a half, a quarter ... of it
_TRIED = 4  # sizes of the input that are measured


@dataclass(frozen=True)
class Scale(Step):
    """Compound scaling (Tan & Le 2019, "EfficientNet", section 3.3), downwards: all dimensions shrink by powers of fixed bases.

    Depth by `depth`^-phi, widths by `width`^-phi, sides of the image by `resolution`^-phi, with the phi at which `macs` is left. What
    cannot shrink, because there is no residual block, no image, or a layer that asks for the size it was built for, leaves its share to
    the others. Blocks go evenly spread, channels by the norms of their weights. The input is resized inside the graph, which takes what it
    took. With validation data the score at sizes in between is measured, without training, and told; with a `drop` the smallest size is
    taken that costs no more points than that. Training has to follow, best toward the original (`distill.Logits`).
    """

    stage: ClassVar[Stage | None] = Stage.STRUCTURE

    macs: float = option(0.5, "share of the multiply-accumulates to keep")
    depth: float = option(1.2, "base of the depth, at least 1; 1: it stays")
    width: float = option(1.1, "base of the widths")
    resolution: float = option(1.15, "base of the sides of the image")
    drop: float | None = option(None, "most points of the score that the smaller image may cost, measured on validation data")

    def __post_init__(self) -> None:
        if not 0 < self.macs < 1:
            raise StepError(f"lighten.Scale: macs is {self.macs}.", "a share between 0 and 1, such as 0.5")
        bases = (self.depth, self.width, self.resolution)
        if min(bases) < 1 or max(bases) == 1:
            raise StepError(f"lighten.Scale: the bases are {', '.join(f'{base:g}' for base in bases)}.", "at least 1, and one above")
        if self.drop is not None and self.drop < 0:
            raise StepError(f"lighten.Scale: drop is {self.drop}.", "0 or more points")

    def requires(self) -> tuple[str, ...]:
        return ("validation",) if self.drop is not None else ()

    def plan(self, graph: Graph, task: Task) -> Plan:
        image, found = _image(graph), _separate(blocks(graph))
        if image is not None and not _works(graph, [max(1, side * 3 // 4) for side in shape(image)[2:]]):
            image = None
        skipped = dict[str, str]()
        if self.resolution > 1 and image is None:
            skipped["input"] = "no input is an image, or a layer asks for its size"
        if self.depth > 1 and len(found) < 2:
            skipped["depth"] = "there are no two residual blocks"
        bases = {
            "depth": self.depth if len(found) > 1 else 1.0,
            "width": self.width,
            "resolution": self.resolution if image is not None else 1.0,
        }
        growth = bases["depth"] * bases["width"] ** 2 * bases["resolution"] ** 2
        if growth == 1:
            return Plan({}, skipped)
        phi = math.log(1 / self.macs) / math.log(growth)
        changes, trial = dict[str, dict[str, Any]](), graph.copy()
        if image is not None and (side := self._input(graph, image, bases["resolution"] ** -phi, task)):
            changes["input"] = side
        gone = _spread(found, 1 - bases["depth"] ** -phi)
        if gone:
            changes["depth"] = {"without": [block.name for block in gone], "of": len(found)}
            _without(trial, changes["depth"]["without"])
        groups = axes(trial)
        for group in groups:
            size = _width(group.size, bases["width"] ** -phi)
            if group.reason or size >= group.size or any(other.name in changes for other in groups.factors(group)):
                skipped[group.name] = group.reason or "it is too narrow, or its factor is cut"
            else:
                keep = _norms(trial, groups, group).topk(size).indices.sort().values.tolist()
                changes[group.name] = {"keep": keep, "of": group.size}
        return Plan(changes, skipped)

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        before = analyze(graph, task.example, latency=False).macs
        if "depth" in plan.changes:
            _without(graph, plan.changes["depth"]["without"])
        surgery.cut(graph, {name: change["keep"] for name, change in plan.changes.items() if "keep" in change})
        if "input" in plan.changes:
            resize(graph, plan.changes["input"]["size"])
        return {"macs": analyze(graph, task.example, latency=False).macs / max(1, before)}

    def _input(self, graph: Graph, image: fx.Node, share: float, task: Task) -> dict[str, Any] | None:
        """The size of the image, and what was measured of sizes between it and the whole."""
        whole = shape(image)[2:]
        sizes = [[max(1, round(side * share ** ((turn + 1) / _TRIED))) for side in whole] for turn in range(_TRIED)]
        sizes = [size for place, size in enumerate(sizes) if size != list(whole) and size not in sizes[:place] and _works(graph, size)]
        if not sizes:
            return None
        if task.validation is None:
            return {"size": sizes[-1], "of": list(whole)}
        scores = resolutions(graph, task, sizes)
        allowed = [size for size in sizes if self.drop is None or self._worse(task, scores[0][1], scores, size) <= self.drop]
        return {"size": allowed[-1], "of": list(whole), "measured": scores} if allowed else None

    def _worse(self, task: Task, whole: float, scores: Sequence[tuple[list[int], float]], size: list[int]) -> float:
        score = next(score for one, score in scores if one == size)
        return whole - score if task.higher_is_better else score - whole


def resolutions(graph: Graph, task: Task, sizes: Sequence[list[int]]) -> list[tuple[list[int], float]]:
    """The task's score on validation data when the image is resized to each of these sizes; first as it is."""
    image, found = _image(graph), list[tuple[list[int], float]]()
    assert image is not None
    for size in [list(shape(image)[2:]), *sizes]:
        trial = graph.copy().eval()
        if size != list(shape(image)[2:]):
            resize(trial, size)
        found.append((size, float(np.mean(task.score(partial(call, trial))))))
    return found


def resize(graph: Graph, size: Sequence[int]) -> None:
    """Puts a resizing of the image (bilinear) behind the input, in place. Raises what torch says of a layer that asks for another size."""
    _insert(graph, size)
    with torch.no_grad():
        graph.refresh()


def _insert(graph: Graph, size: Sequence[int]) -> None:
    image = _image(graph)
    if image is None:
        raise StepError("The network has no image for an input.", "one input [n, channels, height, width]")
    users = list(image.users)
    smaller = graph.operator(aten.upsample_bilinear2d.default, (image, list(size), False, None, None), image, image.next)
    for user in users:
        user.replace_input_with(image, smaller)
    graph.recompile()


def _image(graph: Graph) -> fx.Node | None:
    """The only input that is an image [n, channels, height, width]."""
    inputs = [node for node in graph.fx.nodes if node.op == "placeholder" and node.users]
    found = [node for node in inputs if len(shape(node)) == 4 and node.meta["val"].is_floating_point() and min(shape(node)[2:]) > 1]
    return found[0] if len(found) == 1 else None


def _works(graph: Graph, size: list[int]) -> bool:
    """Whether the network runs on images of another size and gives outputs of the same form."""
    trial, (args, kwargs) = graph.copy().eval(), graph.example()
    _insert(trial, size)
    try:
        with torch.no_grad():
            outputs = sorted(tuple(value.shape) for value in tensors(trial(*args, **kwargs)))
    except (RuntimeError, ValueError):  # what torch says of shapes that do not fit
        return False
    return outputs == sorted(shape(node) for node in graph.fx.output_node().args[0])  # type: ignore[union-attr, arg-type]


def _separate(found: Sequence[Block]) -> list[Block]:
    """The blocks that lie in no other."""
    return [block for block in found if not any(set(block.layers) < set(other.layers) for other in found)]


def _spread(found: Sequence[Block], share: float) -> list[Block]:
    """This share of the blocks, rounded, evenly spread; never all."""
    count = min(round(share * len(found)), len(found) - 1)
    return [found[(2 * place + 1) * len(found) // (2 * count)] for place in range(count)]


def _without(graph: Graph, names: Sequence[str]) -> None:
    skip(graph, [(block, block.total) for block in blocks(graph) if block.name in names])


def _width(size: int, share: float) -> int:
    multiple = _MULTIPLE
    while multiple > 1 and multiple * 4 > size:
        multiple //= 2
    return min(size, max(multiple, round(size * share / multiple) * multiple))


def _norms(graph: Graph, groups: Groups, group: Group) -> Tensor:
    """The norm of the weights that make each channel of the group [size]."""
    total, axis = torch.zeros(group.size, dtype=torch.double), {layer.weight: layer.axis for layer in layers(graph) if layer.kind != "norm"}
    for tensor, dim in group.members:
        if axis.get(tensor) == dim:
            weight = graph.tensor(tensor).detach().double().cpu()
            norms = weight.square().sum([other for other in range(weight.ndim) if other != dim])
            where = groups.places(tensor, dim, group)
            total.index_add_(0, where[where >= 0], norms[where >= 0])
    return total.sqrt()
