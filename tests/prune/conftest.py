"""The reference for a cut: the uncut graph, run with the channels that go set to zero in every tensor and every result."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from multum.graph import Graph, spec
from multum.graph.axes import Groups, Keep, axes


class Masked(fx.Interpreter):
    def __init__(self, graph: Graph, groups: Groups, keep: Keep):
        super().__init__(graph.tensors, graph=graph.fx)
        self.groups, self.keep = groups, keep

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        return self.zeroed(result, self.groups.results[n]) if n.op != "output" and n in self.groups.results else result

    def zeroed(self, value: Any, dims: Any) -> Any:
        if not isinstance(value, Tensor):
            return tuple(self.zeroed(part, own) for part, own in zip(value, dims, strict=True))
        for dim, axis in enumerate(dims):
            if self.groups.size(axis, self.keep) != axis.size:
                shape = [-1 if other == dim else 1 for other in range(value.ndim)]
                mask = self.groups.mask(axis, self.keep).reshape(shape)
                value = torch.where(mask, value, torch.zeros((), dtype=value.dtype))
        return value


@pytest.fixture
def masked() -> Callable[[Graph, Keep, Any], list[Tensor]]:
    """Gives the outputs of a graph with channels set to zero, for inputs of the example's batch size."""

    def run(graph: Graph, keep: Keep, inputs: Any) -> list[Tensor]:
        with torch.no_grad():
            return list(Masked(graph, axes(graph), keep).run(*spec.flatten(inputs, graph.inputs)))

    return run
