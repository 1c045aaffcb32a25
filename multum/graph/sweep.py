"""Running a graph operator by operator, each on all batches before the next: a layer can be changed after its inputs are known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from . import spec
from .capture import arguments
from .model import Graph


class Sweep:
    """Iterating gives every operator just before it runs; results are freed after their last use.

    Tensors of the graph are read when an operator runs, so what is set before counts. The loop body may change them, and
    the results that `values` holds: a list with one value for each batch.
    """

    def __init__(self, graph: Graph, batches: Sequence[Any]):
        self.graph = graph
        self.values: dict[fx.Node, list[Any]] = {}
        self.inputs = [spec.flatten(arguments(batch), graph.inputs) for batch in batches]
        self.freed: dict[fx.Node, list[fx.Node]] = {}
        seen: set[fx.Node] = set()
        for node in reversed(graph.fx.nodes):
            last = [given for given in node.all_input_nodes if given not in seen]
            seen |= {*last}
            self.freed[node] = [*last, *([] if node in seen else [node])]

    def __iter__(self) -> Iterator[fx.Node]:
        places = iter(range(len(self.graph.fx.nodes)))
        device = next((tensor.device for _, tensor in self.graph.named_tensors()), torch.device("cpu"))
        for node in list(self.graph.fx.nodes):
            if node.op == "placeholder":
                place = next(places)
                self.values[node] = [leaves[place].to(device) for leaves in self.inputs]
            elif node.op == "call_function":
                yield node
                self.run(node)
            for done in self.freed[node]:
                self.values.pop(done, None)

    @torch.no_grad()
    def run(self, node: fx.Node) -> list[Any]:
        """The results of the operator that comes next, for each batch; they are kept."""
        if node not in self.values:
            calls = [fx.map_arg((node.args, node.kwargs), partial(self._value, batch=batch)) for batch in range(len(self.inputs))]
            self.values[node] = [node.target(*args, **kwargs) for args, kwargs in calls]  # type: ignore[operator]
        return self.values[node]

    def _value(self, node: fx.Node, *, batch: int) -> Any:
        return self.graph.tensor(str(node.target)) if node.op == "get_attr" else self.values[node][batch]


def live_bytes(graph: Graph) -> int:
    """The most bytes of results that a sample needs at the same time, from the shapes at capture; views count as copies."""
    sweep = Sweep(graph, ())
    sizes = {node: sum(t.numel() * t.element_size() for t in _tensors(node.meta.get("val"))) for node in graph.fx.nodes}
    batch = next((len(node.meta["val"]) for node in graph.fx.nodes if node.op == "placeholder" and node.meta["val"].ndim), 1)
    live = most = 0
    for node in graph.fx.nodes:
        if node.op != "get_attr" and node.op != "output":
            live += sizes[node]
            most = max(most, live)
        live -= sum(sizes[done] for done in sweep.freed[node] if done.op != "get_attr")
    return most // batch


def _tensors(value: Any) -> list[Tensor]:
    return [part for part in (value if isinstance(value, tuple | list) else (value,)) if isinstance(part, Tensor)]
