"""Weights as the methods see them, with what data say of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..analyze.evidence import Evidence
from ..graph import Graph, Layer
from ..graph.matrix import lower_factor, multiplies
from ..task import Task
from .chain import Link

_UNSEEN = 0.01  # of the mean: what rows of a table count that no sample looked up
_DAMP = 0.05  # of the mean over directions of what an error costs the outputs, added to all


class Given:
    """The weights of a graph, outputs first and in double precision, with the second moments of their columns.

    The columns of a table of embeddings are its rows, each of which stands alone: how often they are looked up [rows]. For the layers
    `pulled`, what an error costs the network's outputs counts as well: their weights W are seen as R W, R' R the second moments of
    gradients, so that plain squared errors are the right ones (a Kronecker-factored Fisher matrix; Martens & Grosse 2015, section 3).
    """

    def __init__(self, graph: Graph, task: Task, samples: int, pulled: Sequence[Layer] = ()):
        self.graph, self._counts = graph, dict[str, Tensor]()
        has_data = samples > 0 and task is not None and task.has("calibration")
        self.evidence = Evidence(graph, task, samples) if has_data else None
        found = self.evidence.pulls(pulled) if self.evidence is not None and pulled else {}
        self.roots = {name: _root(pull) for name, pull in found.items()}

    def __call__(self, layer: Layer) -> tuple[Tensor, Tensor | None]:
        """A weight [outputs, ...] as it is seen, and its second moments [height, height] or [rows], or None without data."""
        return self.seen(layer, self.plain(layer)), self.second(layer)

    def second(self, layer: Layer) -> Tensor | None:
        """The second moments of the columns of a layer's weight; None without data."""
        if self.evidence is not None and layer.kind == "embedding":
            if layer.name not in self._counts:
                self._counts[layer.name] = self.evidence.counts(layer)
            counts = self._counts[layer.name]
            return counts + _UNSEEN * counts.mean() + 1e-12
        return self.evidence.second(layer)[0] if self.evidence is not None and multiplies(layer) else None

    def seen(self, layer: Layer, weight: Tensor) -> Tensor:
        """This weight, or another in its place, such that plain squared errors are the right ones."""
        root = self.roots.get(layer.name)
        return weight if root is None else torch.tensordot(root, weight, 1)

    def plain(self, layer: Layer) -> Tensor:
        """A weight, outputs first."""
        return self.graph.tensor(layer.weight).detach().double().movedim(layer.axis, 0)

    def back(self, layer: Layer, links: Sequence[Link]) -> list[Link]:
        """A chain for the weight as it was seen, made one for the weight: its last link makes the outputs."""
        root = self.roots.get(layer.name)
        if root is None:
            return list(links)
        last = links[-1].weight
        made = torch.linalg.solve_triangular(root, last.flatten(1), upper=True).reshape(last.shape)
        return [*links[:-1], replace(links[-1], weight=made)]


def _root(pull: Tensor) -> Tensor:
    """The upper triangular root R, R' R the second moments relative to their mean, a little of which is added to all."""
    scaled = pull / pull.diagonal().mean().clamp_min(1e-30)
    return lower_factor(scaled + _DAMP * torch.eye(len(pull)).to(pull)).T.contiguous()
