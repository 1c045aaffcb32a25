"""Criteria for single weights: functions from what is known to a score for each weight of a layer [the weight's shape].

The lowest scores go first. Scores are comparable between layers but for those in `LAYERWISE`, which measure the outputs of one layer.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from ..analyze.evidence import Evidence
from ..graph import Layer
from ..graph.matrix import from_matrix, multiplies, to_matrix

Criterion = Callable[[Evidence, Layer], Tensor]


def l1(evidence: Evidence, layer: Layer) -> Tensor:
    """|w| (Han et al. 2015, section 3.1)."""
    return _weight(evidence, layer).abs()


def l2(evidence: Evidence, layer: Layer) -> Tensor:
    """w^2: the order of |w| among weights, and the L2 norm where several are added up."""
    return _weight(evidence, layer).square()


def random(evidence: Evidence, layer: Layer) -> Tensor:
    """Uniform in [0, 1), from the task's seed: what every other criterion has to beat (Blalock et al. 2020, section 7.2)."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{evidence.task.seed} {layer.weight}".encode()))
    return torch.rand(_weight(evidence, layer).shape, generator=generator, dtype=torch.double).to(evidence.device)


def lamp(evidence: Evidence, layer: Layer) -> Tensor:
    """w^2 over the sum of the squares that are not smaller: each layer keeps its strongest weights (Lee et al. 2021, equation 1)."""
    squares, order = _weight(evidence, layer).square().flatten().sort(stable=True)
    scores = squares / squares.flip(0).cumsum(0).flip(0).clamp_min(1e-300)
    return torch.empty_like(scores).scatter_(0, order, scores).reshape(evidence.graph.tensor(layer.weight).shape)


def gradient(evidence: Evidence, layer: Layer) -> Tensor:
    """|dL/dw|, the gradient of the task's loss over the training data: weights that the loss does not pull at go."""
    return evidence.gradients[layer.weight].abs().double()


def taylor(evidence: Evidence, layer: Layer) -> Tensor:
    """(w dL/dw)^2: the squared change of the loss to first order (Molchanov et al. 2019, equation 8)."""
    return (_weight(evidence, layer) * evidence.gradients[layer.weight]).square()


def fisher(evidence: Evidence, layer: Layer) -> Tensor:
    """w^2 F / 2 with the diagonal F of the empirical Fisher matrix (Theis et al. 2018, section 2.1)."""
    return _weight(evidence, layer).square() * evidence.squares[layer.weight] / 2


def obd(evidence: Evidence, layer: Layer) -> Tensor:
    """w^2 h / 2 with the diagonal h of the Hessian (LeCun, Denker & Solla 1990, equation 5), of the squared change of the outputs."""
    return _weight(evidence, layer).square() * evidence.curvature[layer.weight] / 2


def wanda(evidence: Evidence, layer: Layer) -> Tensor:
    """|w| times the L2 norm of the input that it meets, and compared within an output (Sun et al. 2024, section 3); else |w|."""
    weight = _weight(evidence, layer)
    if not multiplies(layer):
        return weight.abs()
    norms = evidence.powers[layer.name].sqrt()[:, None]
    return from_matrix(layer, to_matrix(layer, weight).abs() * norms, weight.shape)


def _weight(evidence: Evidence, layer: Layer) -> Tensor:
    return evidence.graph.tensor(layer.weight).detach().double()


CRITERIA: dict[str, Criterion] = {f.__name__: f for f in (l1, l2, random, lamp, gradient, taylor, fisher, obd, wanda)}
LAYERWISE = ("wanda", "obs", "sparsegpt")
NEEDS = {"gradient": ("train", "loss"), "taylor": ("train", "loss"), "fisher": ("train", "loss")} | dict.fromkeys(
    ("obd", "wanda", "obs", "sparsegpt"), ("calibration",)
)
