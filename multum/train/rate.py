"""The rate term of training: weights on a grid are drawn to where their integers take no more bits than asked."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import TrainError
from ..graph import Graph
from ..graph.layers import QUANTIZERS, source
from ..graph.model import read
from .companion import Companion

_RAMP = 0.5  # share of the training after which the target holds; until then it falls in a straight line
_BETWEEN = 8  # steps between two looks at the entropy
_GAIN, _MOST = 8.0, 0.25  # of the multiplier's logarithm, for all of the target too much; at most so much at a time
_CLOSE = 1.03  # times the target is as good as the target
_FIRST = 0.1  # the multiplier, loss per bit, to begin with
_SAMPLE = 1 << 20  # weights that are counted


class Rate(Companion):
    """Holds the entropy of the quantized weights to `target` bits per weight, by a term of the loss.

    The constraint "zero-order entropy of the integers at most the target" is met by its Lagrangian: the multiplier rises while the
    entropy is above and falls while it is below. Entropy has no gradient; in its place stands that of log2(1 + e m) bits for a weight
    of a tensor, m the mean magnitude of the tensor in steps of its grid: the entropy of a geometric distribution with this mean, nearly.

    Raises TrainError when no weight that trains is on a grid, and for a target that is not above zero.
    """

    def __init__(self, target: float):
        if not 0 < target < math.inf:
            raise TrainError(f"bits is {target!r}.", "a number above zero")
        self.target, self.multiplier, self.start = target, _FIRST, math.nan
        self.key = f"rate {target}"

    def join(self, graph: Graph) -> None:
        self.rows = [
            (graph.tensor(str(source(node))), *_grid(graph, node))
            for node in graph.find(*QUANTIZERS)
            if source(node) is not None and graph.tensor(str(source(node))).requires_grad
        ]
        self.size = sum(weight.numel() for weight, *_ in self.rows)
        if not self.size:
            raise TrainError(f"No weight is quantized to hold to {self.target} bits.", "quantized weights", "quantize first")

    def term(self) -> Tensor:
        """What is added to the loss: multiplier times bits per weight, about []."""
        bits = [weight.numel() * torch.log2(1 + math.e * (weight / scale).abs().mean()) for weight, scale, _, _ in self.rows]
        return self.multiplier / self.size * torch.stack(bits).sum()

    def before(self, step: int, steps: int) -> None:
        """Moves the multiplier, now and then."""
        if step % _BETWEEN:
            return
        now = self.entropy()
        self.start = now if math.isnan(self.start) else self.start
        left = max(0.0, 1 - step / (_RAMP * steps))
        wanted = self.target + left * max(0.0, self.start - self.target)
        self.multiplier *= math.exp(max(-_MOST, min(_MOST, _GAIN * (now / wanted - 1))))

    def met(self) -> bool:
        return self.entropy() <= self.target * _CLOSE

    def measured(self) -> dict[str, Any]:
        return {"bits": self.entropy()}

    def state(self) -> dict[str, Tensor]:
        return {"rate": torch.tensor([self.multiplier, self.start], dtype=torch.float64)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.multiplier, self.start = state["rate"].tolist()

    @torch.no_grad()
    def entropy(self) -> float:
        """Bits per weight of the integers, each tensor by its own histogram."""
        stride = -(-self.size // _SAMPLE)
        integers = ((weight / scale).reshape(-1)[::stride].round().clamp(low, high) for weight, scale, low, high in self.rows)
        bits = [weight.numel() * entropy(values) for (weight, *_), values in zip(self.rows, integers, strict=True)]
        return float(torch.stack(bits).sum()) / self.size


def entropy(integers: Tensor) -> Tensor:
    """Bits per integer [] by their own histogram: what a coder without context needs."""
    values = integers.flatten().long()
    share = torch.bincount(values - values.min()) / values.numel()
    bits: Tensor = torch.special.entr(share).sum() / math.log(2)
    return bits


def _grid(graph: Graph, node: fx.Node) -> tuple[Tensor, int, int]:
    """The scale of a quantizer, shaped to divide its weight, and the smallest and largest integer."""
    scale = graph.tensor(str(read(node, "scale").target))
    if scale.ndim and (axis := read(node, "axis")) is not None:
        weight = graph.tensor(str(source(node)))
        scale = scale.view([-1 if dim == axis else 1 for dim in range(weight.ndim)])
    return scale, int(read(node, "quant_min")), int(read(node, "quant_max"))
