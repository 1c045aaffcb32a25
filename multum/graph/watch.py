"""Looking at the results of operators while a graph runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

from . import spec
from .capture import arguments
from .model import Graph


class _Seen(Exception):
    """All has been shown."""


class Watch(fx.Interpreter):
    """Runs the graph up to the last of some nodes and shows their results to a function; every result is freed after its last use."""

    def __init__(self, graph: Graph, nodes: Iterable[fx.Node], see: Callable[[fx.Node, Any], Any]):
        super().__init__(graph.tensors, garbage_collect_values=True, graph=graph.fx)
        self.inputs, self.nodes, self.see = graph.inputs, frozenset(nodes), see
        self.last = next((node for node in reversed(graph.fx.nodes) if node in self.nodes), None)

    def __call__(self, inputs: Any) -> None:
        """Runs one batch. What `see` returns, unless it is None, takes the place of the result."""
        with contextlib.suppress(_Seen):
            self.run(*spec.flatten(arguments(inputs), self.inputs))
        self.env.clear()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.nodes:
            changed = self.see(n, result)
            if n is self.last:
                raise _Seen
            return result if changed is None else changed
        return result
