"""Setting weights to zero: what masks of every shape share. A shape is a function that chooses among the scores of a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..analyze.evidence import Evidence
from ..errors import StepError, near
from ..graph import Graph, Layer, layers, select
from ..graph.matrix import from_matrix, to_matrix
from ..graph.sparse import sparsify
from ..task import Task
from .criteria import CRITERIA, NEEDS
from .obs import SURGEONS, Choice, restored
from .recover import Fit, inputs, recover, refittable

KINDS = ("conv", "linear", "embedding", "rnn")


def criterion_needs(criterion: str | None) -> tuple[str, ...]:
    """What of the task a criterion uses. Raises StepError, with the near misses, for one that there is not."""
    known = (*CRITERIA, *SURGEONS)
    if criterion is not None and criterion not in known:
        raise StepError(f"There is no criterion {criterion!r}.", f"one of the criteria, such as {near(criterion, known)}")
    return NEEDS.get(criterion or "", ())


def check_masking(criterion: str | None, ratio: float, samples: int) -> None:
    """Raises StepError for options that no mask can have."""
    criterion_needs(criterion)
    if not 0 < ratio < 1:
        raise StepError(f"The share of weights to set to zero is {ratio}.", "a ratio between 0 and 1, such as 0.5")
    if samples < 1:
        raise StepError(f"{samples} samples are asked for.", "at least 1, such as 512")


def maskable(graph: Graph, include: str | Sequence[str], exclude: str | Sequence[str]) -> tuple[list[Layer], dict[str, str]]:
    """The layers whose weights may be set to zero, one for each weight, and the reason for each other one."""
    known = [layer for layer in layers(graph) if layer.kind in KINDS]
    wanted = {layer.name for layer in select(graph, include, exclude, KINDS)}
    chosen, skipped = dict[str, Layer](), dict[str, str]()
    for layer in known:
        sharers = {other.name for other in known if other.weight == layer.weight}
        weight = graph.tensor(layer.weight)
        if layer.name not in wanted:
            skipped[layer.name] = "excluded by name"
        elif not sharers <= wanted:
            skipped[layer.name] = f"shares its weight with {', '.join(sorted(sharers - wanted))}, which is excluded"
        elif weight.ndim < 2 or not weight.is_floating_point() or not torch.isfinite(weight).all():
            skipped[layer.name] = "its weight is no finite matrix"
        elif layer.quantizer() is not None:
            skipped[layer.name] = "its weight is quantized already"
        elif layer.weight in chosen:
            skipped[layer.name] = f"its weight is that of {chosen[layer.weight].name}"
        else:
            chosen[layer.weight] = layer
    return list(chosen.values()), skipped


def mask(graph: Graph, task: Task, choices: Mapping[str, Choice], criterion: str, samples: int, recovers: bool) -> None:
    """Sets to zero, for good, what is chosen by a criterion in each of these layers; in place.

    When it `recovers` the weights that stay make good, layer by layer, on calibration data.
    """
    evidence, known = Evidence(graph, task, samples), {layer.name: layer for layer in layers(graph)}
    fitted = {layer.name for layer in refittable(graph)}
    zeros, fits = dict[str, Tensor](), dict[str, Fit]()
    for name, choice in choices.items():
        layer = known[name]
        refits = recovers and name in fitted
        if refits and criterion in SURGEONS:
            fits[name] = _surgeon(criterion, choice)
            continue
        scores = to_matrix(layer, CRITERIA["l1" if criterion in SURGEONS else criterion](evidence, layer))
        zero = choice.choose(scores, slice(0, scores.shape[2]), 1.0)
        if refits:
            fits[name] = _restorer(zero)
        else:
            zeros[name] = zero
    original = graph.copy() if recovers else graph
    for name, zero in zeros.items():
        shape = graph.tensor(known[name].weight).shape
        sparsify(graph, known[name].weight, from_matrix(known[name], zero, shape))
    if recovers:
        recover(graph, original, inputs(task, samples, graph, original), fits, lambda node, value: value)
    for name in fits:
        sparsify(graph, known[name].weight, graph.tensor(known[name].weight).detach() == 0)


def _restorer(zero: Tensor) -> Fit:
    return lambda matrix, errors: restored(matrix, errors.gram, zero, errors.pull)


def _surgeon(criterion: str, choice: Choice) -> Fit:
    return lambda matrix, errors: SURGEONS[criterion](matrix, errors.gram, errors.pull, choice)
