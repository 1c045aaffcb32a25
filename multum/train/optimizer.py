"""How a training goes: its length, its rate, and what moves the parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import TrainError
from ..graph import Graph, layers
from ..graph.model import aten, read

_LEARNED_QUANTIZERS = (aten._fake_quantize_learnable_per_tensor_affine.default, aten._fake_quantize_learnable_per_channel_affine.default)

OPTIMIZER = "adamw, which stays near the weights as they are, or sgd: better in ten passes after deep cuts"
_FRESH = {"adamw": 3e-3, "sgd": 0.1}  # the rate of parameters that begin anew, where that of the others is lower
_DEFAULTS = {"adamw": {"weight_decay": 0.01, "clip": 1.0}, "sgd": {"weight_decay": 5e-4, "clip": 5.0}}


@dataclass(frozen=True)
class Training:
    """How to train. `epochs` may be a fraction of a pass; the rate warms up linearly, then falls to zero as a cosine.

    `warmup` is a share of all steps; `clip` bounds the norm of the gradient (0: not at all); `patience` is the number of
    passes without a better validation score after which training stops (0: never); in `memory` MB the teacher's answers are kept for
    the passes to come. Parameters under the name `fresh` begin anew and learn faster. When not given, `weight_decay` and `clip` are 0.01
    and 1 for adamw; for sgd, whose decay acts through the gradient and whose steps grow with it, 5e-4 and 5.
    """

    epochs: float = 1.0
    learning_rate: float = 1e-3
    optimizer: str = "adamw"
    weight_decay: float | None = None
    warmup: float = 0.05
    clip: float | None = None
    patience: int = 0
    memory: float = 256.0
    fresh: str = ""

    def __post_init__(self) -> None:
        if self.optimizer not in _DEFAULTS:
            raise TrainError(f"The optimizer is {self.optimizer!r}.", "'adamw' or 'sgd'")
        for name, value in _DEFAULTS[self.optimizer].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("epochs", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise TrainError(f"{name} is {getattr(self, name)!r}.", "a number above zero")
        for name, most in (("weight_decay", math.inf), ("warmup", 1.0), ("clip", math.inf), ("patience", math.inf), ("memory", math.inf)):
            if not 0 <= getattr(self, name) <= most:
                raise TrainError(f"{name} is {getattr(self, name)!r}.", f"a number from 0 to {most}")

    @classmethod
    def of(cls, graph: Graph, learning_rate: float | None = None, optimizer: str = "adamw", **rest: Any) -> Training:
        """The same with the graph's own learning rate, when none is given."""
        return cls(learning_rate=default_rate(graph, optimizer) if learning_rate is None else learning_rate, optimizer=optimizer, **rest)

    def remembered(self) -> float:
        """Bytes for the teacher's answers; none for a single pass, in which no sample comes twice."""
        return self.memory * 2**20 if self.epochs > 1 else 0.0

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of one of `steps` steps."""
        warm = round(self.warmup * steps)
        if step < warm:
            return self.learning_rate * (step + 1) / (warm + 1)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def default_rate(graph: Graph, optimizer: str) -> float:
    """A learning rate for a trained network that has lost something.

    Batch normalization makes the outputs independent of the scale of the weights, so that large steps do no harm.
    Without it, in transformers and where it was folded before quantization, they destroy what is there.
    With it SGD goes far from the old minimum, and in ten passes to a better one than AdamW, which stays near.
    """
    if not graph.find(aten.batch_norm.default):
        return 1e-3 if optimizer == "sgd" else 1e-4
    return 0.05 if optimizer == "sgd" else 1e-3


def optimizer(graph: Graph, how: Training, device: torch.device) -> torch.optim.Optimizer:
    """Only weights that multiply decay: not biases, norms, positions or scales of quantizers.

    AdamW moves every number by about the learning rate, whatever its size, which would throw the small scales of quantizers
    about: their rate is in proportion to their size.
    """
    decaying = {layer.weight for layer in layers(graph) if layer.kind in ("conv", "linear", "rnn")}
    learned = {id(scale) for scale in scales(graph)} if how.optimizer == "adamw" else set()
    rows: list[dict[str, Any]] = [{"params": [], "weight_decay": weight_decay} for weight_decay in (0.0, how.weight_decay)]
    for name, parameter in sorted(graph.tensors.named_parameters()):  # a graph from a file has them in another order
        if not parameter.requires_grad:
            continue
        if id(parameter) in learned:
            rows.append({"params": [parameter], "weight_decay": 0.0, "factor": float(parameter.detach().abs().mean())})
        elif how.fresh and name.startswith(f"{how.fresh}."):
            factor = max(1.0, _FRESH[how.optimizer] / how.learning_rate)
            rows.append({"params": [parameter], "weight_decay": rows[name in decaying]["weight_decay"], "factor": factor})
        else:
            rows[name in decaying]["params"].append(parameter)
    rows = [row for row in rows if row["params"]]
    fused = True if device.type in ("cpu", "cuda") else None
    if how.optimizer == "sgd":
        return torch.optim.SGD(rows, how.learning_rate, momentum=0.9, nesterov=True, fused=fused)
    return torch.optim.AdamW(rows, how.learning_rate, fused=fused)


def scales(graph: Graph) -> list[Tensor]:
    """The learned scales of quantizers."""
    nodes = [read(node, "scale") for node in graph.find(*_LEARNED_QUANTIZERS)]
    return [graph.tensor(str(node.target)) for node in nodes if isinstance(node, fx.Node) and node.op == "get_attr"]
