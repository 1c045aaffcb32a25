"""A small zoo of light networks, made for a task; and how alike samples relate in a network and in the original."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import StepError, near
from ..graph import Graph, layers, spec
from ..graph.layers import KINDS
from ..task import Task, calibration, call

_WIDTH = 32


@dataclass(frozen=True)
class _Form:
    """What a network reads: `kind`, the place of the tensor among the inputs, its channels (or words), and the mask's place."""

    kind: str
    place: int
    channels: int
    mask: int | None = None


class _Light(nn.Module):
    """A body in the inputs and outputs of the task's model."""

    def __init__(self, body: nn.Module, form: _Form, original: Graph):
        super().__init__()
        self.body, self.form, self.inputs, self.outputs = body, form, original.inputs, original.outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves = spec.flatten((args, kwargs), self.inputs)
        mask = () if self.form.mask is None else (leaves[self.form.mask],)
        return spec.unflatten([self.body(leaves[self.form.place], *mask)], self.outputs)


class _Words(nn.Module):
    """Embeddings [n, t, 16] of ids, then their mean where the mask is 1 or a GRU over them, then classes [n, classes]."""

    def __init__(self, words: int, classes: int, recurrent: bool):
        super().__init__()
        self.words = nn.Embedding(words, _WIDTH // 2)
        self.gru = nn.GRU(_WIDTH // 2, _WIDTH, batch_first=True) if recurrent else None
        self.head = nn.Linear(_WIDTH if recurrent else _WIDTH // 2, classes)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x: Tensor = self.words(ids)
        x = x if self.gru is None else self.gru(x)[0]
        share = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x.dtype)
        result: Tensor = self.head((x * share).sum(1) / share.sum(1).clamp_min(1))
        return result


class _Recurrent(nn.Module):
    """A GRU over [n, t, channels], or [n, channels, t] turned so; classes from its mean over time."""

    def __init__(self, channels: int, classes: int, turn: bool):
        super().__init__()
        self.gru, self.head, self.turn = nn.GRU(channels, _WIDTH, batch_first=True), nn.Linear(_WIDTH, classes), turn

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.gru(x.transpose(1, 2) if self.turn else x)[0].mean(1))
        return result


class _Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def _mobile(channels: int, classes: int) -> nn.Module:
    """Depthwise and pointwise convolutions (Howard et al. 2017, MobileNets, section 3.1)."""
    rows: list[nn.Module] = [nn.Conv2d(channels, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    for inputs, outputs, stride in ((16, 32, 1), (32, 64, 2), (64, 64, 1), (64, 64, 1)):
        rows += [nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False), nn.BatchNorm2d(inputs), nn.ReLU()]
        rows += [nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*rows, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def _conv1d(channels: int, classes: int, turn: bool) -> nn.Module:
    rows: list[nn.Module] = [_Turned()] if turn else []
    for inputs in (channels, _WIDTH):
        rows += [nn.Conv1d(inputs, _WIDTH, 5, padding=2, bias=False), nn.BatchNorm1d(_WIDTH), nn.ReLU()]
    return nn.Sequential(*rows, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(_WIDTH, classes))


def _mlp(channels: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(channels, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, classes))


# what each kind of input has networks for, by name
_ZOO: dict[str, dict[str, Callable[[int, int], nn.Module]]] = {
    "images": {"mobile": _mobile},
    "signals": {"conv1d": lambda c, n: _conv1d(c, n, False), "gru": lambda c, n: _Recurrent(c, n, True)},
    "sequences": {"conv1d": lambda c, n: _conv1d(c, n, True), "gru": lambda c, n: _Recurrent(c, n, False)},
    "texts": {"bag": lambda c, n: _Words(c, n, False), "gru": lambda c, n: _Words(c, n, True)},
    "features": {"mlp": _mlp},
}


def zoo(task: Task) -> list[str]:
    """The names of the light networks that fit the task. Raises StepError when it has other inputs or outputs than they know."""
    return list(_ZOO[_form(task.original)[0].kind])


def light(name: str, task: Task) -> nn.Module:
    """A small untrained network that takes and gives what the task's model does: give it to `compress(task, steps, student=...)`.

    `mobile` for images [n, c, h, w]; `conv1d` and `gru` for signals [n, c, t] and sequences [n, t, c]; `bag` (the mean of the words'
    embeddings; Joulin et al. 2017, section 2) and `gru` for ids [n, t]; `mlp` for features [n, d]. Raises StepError for other names, inputs
    and outputs.
    """
    form, classes = _form(task.original)
    known = _ZOO[form.kind]
    if name not in known:
        raise StepError(f"There is no light network {name!r} for {form.kind}.", f"one of {', '.join(known)}, such as {near(name, known)}")
    with torch.random.fork_rng([]):
        torch.manual_seed(task.seed)
        return _Light(known[name](form.channels, classes), form, task.original)


def affinity(student: Graph, task: Task, samples: int = 128) -> float:
    """How alike samples relate in a student and in the original, from 0 to 1, before any training.

    The zero-cost score of Dong et al. 2023 (DisWOT, section 3.2: relations of samples), as the linear CKA (Kornblith et al. 2019,
    section 3) of what the last linear layer of each reads. Samples are of the calibration data. It ranks students that begin alike; one
    that was cut from the original begins ahead.
    """
    task.data("calibration")
    batches = list(calibration(task, samples))
    ours, theirs = (_features(graph, batches) for graph in (student, task.original))
    ours, theirs = (value - value.mean(0) for value in (ours, theirs))
    grams = [value @ value.T for value in (ours, theirs)]
    alike = (grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm()).clamp_min(1e-12)
    return float(alike)


@torch.no_grad()
def _features(graph: Graph, batches: Sequence[Any]) -> Tensor:
    """What the last linear layer reads, or the outputs where there is none, [n, ...] as [n, d]."""
    graph = graph.copy().eval()
    last = graph.find(*KINDS["linear"])[-1:]
    graph.tap([node.args[0] if isinstance(node.args[0], fx.Node) else node for node in last] or graph.fx.output_node().all_input_nodes[:1])
    rows = []
    for inputs in batches:
        call(graph, inputs)
        rows.append(graph.tapped[0].double().flatten(1))
    return torch.cat(rows)


def _form(graph: Graph) -> tuple[_Form, int]:
    """What the network reads, and its classes. Raises StepError when no light network reads and gives that."""
    places = [node for node in graph.fx.nodes if node.op == "placeholder"]
    results = [node.meta["val"] for node in graph.fx.output_node().all_input_nodes]
    if spec.check(graph.outputs) != 1 or results[0].ndim != 2 or not results[0].is_floating_point():
        raise StepError("Light networks give one output [n, classes].", "an original that does", "distill.student cuts one out of it")
    classes, values = int(results[0].shape[1]), [node.meta["val"] for node in places]
    for place, (node, value) in enumerate(zip(places, values, strict=True)):
        if not value.is_floating_point() and value.ndim == 2:
            words = [graph.tensor(layer.weight).shape[0] for layer in layers(graph) if layer.kind == "embedding"]
            masks = [other for other, found in enumerate(places) if "mask" in found.name and values[other].shape == value.shape]
            if words and place not in masks:
                return _Form("texts", place, max(words), masks[0] if masks else None), classes
        elif value.is_floating_point() and value.ndim == 3:
            turned = any(user.target in KINDS["conv"] for user in node.users)
            return _Form("signals" if turned else "sequences", place, value.shape[1 if turned else 2]), classes
        elif value.is_floating_point() and value.ndim in (2, 4):
            return _Form("images" if value.ndim == 4 else "features", place, value.shape[1]), classes
    given = ", ".join(str(list(value.shape)) for value in values)
    raise StepError(f"There is no light network for inputs {given}.", "images, signals, sequences, ids or features")
