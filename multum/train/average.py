"""The mean of the weights of past steps, which is often better than the last of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import TrainError
from ..graph import Graph
from .companion import Companion


class Average(Companion):
    """Judges, and keeps, the exponential moving average of weights and statistics.

    Polyak & Juditsky 1992; Tarvainen & Valpola 2017 (mean teacher), section 2. Its memory grows with the steps up to `decay`, so that the
    beginning is forgotten.
    """

    def __init__(self, decay: float = 0.999):
        if not 0 < decay < 1:
            raise TrainError(f"The decay of the average is {decay!r}.", "a number between 0 and 1, such as 0.999")
        self.decay, self.key = decay, f"average {decay}"

    def join(self, graph: Graph) -> None:
        self.own = {name: value for name, value in graph.named_tensors() if value.is_floating_point()}
        self.mean = {name: value.detach().clone() for name, value in self.own.items()}

    def after(self, step: int, steps: int) -> None:
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, value in self.own.items():
            self.mean[name].lerp_(value, share)

    @contextmanager
    def judged(self) -> Iterator[None]:
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self.own.items():
            kept = value.clone()
            value.copy_(self.mean[name])
            self.mean[name].copy_(kept)

    def state(self) -> dict[str, Tensor]:
        return self.mean

    def restore(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            self.mean[name].copy_(value)
