"""Half precision for whatever is still in floating point: biases, scales, norms, and weights that no other step took."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import StepError
from ..graph import Graph
from ..graph.file import from_integers, quantized_weights, to_integers
from ..graph.fuse import fuse
from ..step import Plan, Stage, Step, option
from ..task import Task

_FORMATS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Half(Step):
    """Rounds every floating-point tensor to 16 bits (IEEE 754 half precision, or bfloat16).

    Normalizations are folded first, so that there is less to round. The tensors stay float32 in the graph, so it trains and
    exports as before; in the file their empty bits cost nothing. Integers of quantized weights stay: only their scales are
    rounded.
    """

    stage: ClassVar[Stage | None] = Stage.NUMBERS

    format: str = option("float16", "float16 (11 significant bits) or bfloat16 (8, and the range of float32)")

    def __post_init__(self) -> None:
        if self.format not in _FORMATS:
            raise StepError(f"quantize.Half: format is {self.format!r}.", f"one of {', '.join(_FORMATS)}")

    def plan(self, graph: Graph, task: Task) -> Plan:
        changes, skipped = {}, {}
        graph = graph.copy()
        fuse(graph)
        integers = quantized_weights(graph)
        for name, tensor in graph.named_tensors():
            value = tensor.detach()
            if value.dtype is not torch.float32:
                skipped[name] = f"holds {str(value.dtype).removeprefix('torch.')}"
            elif name in integers:
                skipped[name] = "is stored as integers"
            elif value.numel() and value.abs().max() > torch.finfo(_FORMATS[self.format]).max:
                skipped[name] = f"holds values beyond the range of {self.format}"
            elif torch.equal(self._round(value), value):
                skipped[name] = f"is exact in {self.format} already"
            else:
                changes[name] = {"format": self.format}
        return Plan(changes, skipped)

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        fuse(graph)
        integers = quantized_weights(graph)
        levels = {name: to_integers(graph.tensor(name).detach(), graph, node) for name, node in integers.items()}
        for name in plan.changes:
            graph.set_tensor(name, self._round(graph.tensor(name).detach()))
        for name, node in integers.items():  # the same integers on the rounded scales
            graph.set_tensor(name, from_integers(levels[name], graph, node))
        return {}

    def _round(self, value: Tensor) -> Tensor:
        return value.to(_FORMATS[self.format]).to(value.dtype)
