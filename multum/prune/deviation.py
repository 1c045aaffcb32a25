"""How far the outputs of a graph are from those of the original."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..graph import Graph
from ..task import call, tensors
from ..train import arrange


class Deviation:
    """The squared differences of a graph's outputs to those of `original`, relative to their variance over all samples of `batches`.

    0: the same outputs; 1: no better than their mean. Of several outputs the mean; infinite when some are not finite.
    """

    def __init__(self, original: Graph, batches: Sequence[Any]):
        self.batches = batches
        self.wanted = [torch.cat(parts) for parts in zip(*self._outputs(original), strict=True)]

    def __call__(self, graph: Graph) -> float:
        given = (torch.cat(parts) for parts in zip(*self._outputs(graph), strict=True))
        parts = [_relative(now, wanted) for now, wanted in zip(given, self.wanted, strict=True)]
        return sum(parts) / len(parts) if parts else 0.0

    def _outputs(self, graph: Graph) -> Iterator[list[Tensor]]:
        device = next((tensor.device for _, tensor in graph.named_tensors()), torch.device("cpu"))
        graph.eval()
        with torch.no_grad():
            for batch in self.batches:
                found = tensors(call(graph, arrange(batch, device)))
                yield [output.flatten(1) if output.ndim > 1 else output[None] for output in found if output.is_floating_point()]


def _relative(given: Tensor, wanted: Tensor) -> float:
    wanted = wanted.double()
    off = (given.double() - wanted).square().sum()
    found = float(off / (wanted - wanted.mean(0)).square().sum().clamp_min(1e-30))
    return found if found == found else float("inf")
