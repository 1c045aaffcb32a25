"""Layers that begin to train one after another, the last one first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import TrainError
from ..graph import Graph
from .companion import Companion


class Unfreeze(Companion):
    """Frees the parameters from the last layer to the first, evenly over a share of the steps (Howard & Ruder 2018, section 3.3).

    What is frozen keeps its weights; statistics of batch normalization follow the data from the first step on.
    """

    def __init__(self, share: float):
        if not 0 < share <= 1:
            raise TrainError(f"The share of the steps in which layers are freed is {share!r}.", "above 0 and at most 1, such as 0.5")
        self.share, self.key = share, f"unfreeze {share}"
        self.free = 1  # groups of parameters that train at the next step

    def join(self, graph: Graph) -> None:
        """The parameters of one module after another, the module that is read last first."""
        groups: dict[str, list[Tensor]] = {}
        for node in graph.fx.nodes:
            if node.op == "get_attr" and (value := graph.tensor(str(node.target))).requires_grad:
                groups.setdefault(str(node.target).rpartition(".")[0], []).append(value)
        self.groups = list(reversed(groups.values()))

    def view(self, inputs: Any) -> Any:
        self._free(self.free)
        return inputs

    def after(self, step: int, steps: int) -> None:
        over = (step + 1) / (self.share * steps)
        self.free = min(len(self.groups), 1 + int(over * len(self.groups)))

    def measured(self) -> dict[str, Any]:
        self._free(len(self.groups))  # nothing is left frozen
        return {}

    def state(self) -> dict[str, Tensor]:
        return {"free": torch.tensor(self.free)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.free = int(state["free"])

    def _free(self, count: int) -> None:
        for place, group in enumerate(self.groups):
            for value in group:
                value.requires_grad_(place < count)
