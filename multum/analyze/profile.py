"""Parameters, MACs, bytes, memory and time, layer by layer: shapes give the first, running the graph the rest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import TaskError
from ..graph import Graph, capture, layers, spec
from ..graph.capture import arguments
from ..graph.layers import source
from ..task import Task, tensors
from .macs import gives_tensors, macs

_SECONDS = 3.0  # for timing, beyond the first runs
_RUNS = (5, 50)  # at least, at most


@dataclass
class Row:
    """A layer; or, with no weight of their own, all operators of one kind.

    `bytes` are those of parameters and buffers as they lie in memory; a tied tensor counts where it is used first.
    `activations` are the bytes of new results, for one sample. `ms` is the sum of the median times of its operators, in
    place between the others. `macs` is None where no formula covers an operator.
    """

    name: str
    kind: str
    tensors: list[str] = field(default_factory=list)
    parameters: int = 0
    macs: int | None = 0
    bytes: int = 0
    activations: int = 0
    ms: float | None = None


@dataclass
class Analysis:
    """The rows in order of execution; totals; and the operators whose MACs no formula covers, each with the reason.

    `memory` is the largest sum of bytes of results that are needed at the same time, for one sample, without the weights.
    `ms` is the median time of the whole graph for one sample on `threads` threads; None without timing.
    """

    layers: list[Row]
    parameters: int
    macs: int
    bytes: int
    memory: int
    ms: float | None
    threads: int
    uncounted: dict[str, str]

    def to_data(self) -> dict[str, Any]:
        total = {"parameters": self.parameters, "macs": self.macs, "bytes": self.bytes, "activations": self.memory, "ms": self.ms}
        rows = [asdict(row) for row in self.layers]
        return {"layers": rows, "total": total, "uncounted": self.uncounted, "threads": self.threads}


def analyze(model: Task | Graph | nn.Module, example: Any = None, *, latency: bool = True) -> Analysis:
    """Takes a model apart at batch size 1, on its device, as it is: nothing is fused.

    Without an `example` a task gives its own, and a graph is run on zeros.
    """
    graph, example = captured(model, example)
    leaves = _one_sample(graph, example)
    found = _Shapes(graph)
    with torch.no_grad():
        found.run(*leaves)
        runs, whole = _time(graph, leaves) if latency else ({}, None)
    rows = _rows(graph)
    uncounted: dict[str, str] = {}
    for node, row in rows.items():
        row.activations += found.bytes.get(node, 0)
        if node in runs:
            row.ms = (row.ms or 0.0) + runs[node]
        count = found.macs.get(node, 0)
        if count is None:
            uncounted[str(node.target)] = "no formula for its MACs"
            row.macs = None
        elif row.macs is not None:
            row.macs += count
    distinct = list({id(row): row for row in rows.values()}.values())
    held = [tensor for _, tensor in graph.named_tensors()]
    return Analysis(
        layers=distinct,
        parameters=sum(parameter.numel() for parameter in graph.tensors.parameters()),
        macs=sum(count or 0 for count in found.macs.values()),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in held),
        memory=found.peak,
        ms=whole,
        threads=torch.get_num_threads(),
        uncounted=uncounted,
    )


def captured(model: Task | Graph | nn.Module, example: Any) -> tuple[Graph, Any]:
    """The graph of whatever was given, in eval mode, and an example if there is one."""
    if isinstance(model, Task):
        return model.original, model.example if example is None else example
    if isinstance(model, Graph):
        if model.training:
            model = model.copy().eval()
        return model, example
    if isinstance(model, nn.Module) and example is not None:
        return capture(model, example), example
    raise TaskError(
        f"analyze was given a {type(model).__name__} and {'an' if example is not None else 'no'} example.",
        "a Task, a Graph, or a model with an example",
    )


def _one_sample(graph: Graph, example: Any) -> list[Tensor]:
    """The graph's inputs, in order, with the first sample alone where they have a batch."""
    device = next((tensor.device for _, tensor in graph.named_tensors()), torch.device("cpu"))
    given = graph.example() if example is None else arguments(example)
    leaves = [leaf.to(device) for leaf in spec.flatten(given, graph.inputs)]
    batch = leaves[0].shape[0] if leaves and leaves[0].ndim else 0
    # clones: an example may be a view of all the data, whose bytes are not those of a sample
    return [(leaf[:1] if leaf.ndim and leaf.shape[0] == batch else leaf).clone() for leaf in leaves]


def _rows(graph: Graph) -> dict[fx.Node, Row]:
    """The row of every operator. A tensor belongs to the operator that uses it first, be it a layer or not."""
    kinds = {layer.node: (_name(layer.name, layer.kind), layer.kind) for layer in reversed(layers(graph))}
    parameters = dict(graph.tensors.named_parameters())
    rows: dict[fx.Node, Row] = {}
    groups: dict[str, Row] = {}
    seen: set[str] = set()
    for node in graph.fx.nodes:
        if node.op != "call_function" or not gives_tensors(node):
            continue
        if node in kinds:
            row = rows[node] = Row(*kinds[node])
        else:
            name = node.target._schema.name.split("::")[1]
            row = rows[node] = groups.setdefault(name, Row(name, "operator"))
        if source(node) is not None:  # a weight on its way to its layer, which owns it
            continue
        for name in _owned(node):
            if name not in seen:
                seen.add(name)
                tensor = graph.tensor(name)
                row.tensors.append(name)
                row.parameters += tensor.numel() if name in parameters else 0
                row.bytes += tensor.numel() * tensor.element_size()
    return rows


def _name(name: str, kind: str) -> str:
    """Of a recurrent layer, which has a `Layer` for each matrix: the name of the module."""
    return name.rpartition(".")[0] or name if kind == "rnn" else name


def _owned(node: fx.Node) -> Iterator[str]:
    """The tensors that an operator reads, also through quantizers and transposes, with their scales."""
    for before in node.all_input_nodes:
        if before.op == "get_attr":
            yield str(before.target)
        elif source(before) is not None:
            yield from _owned(before)


class _Run(fx.Interpreter):
    """Runs a graph operator by operator and forgets results that are no longer needed."""

    def __init__(self, graph: Graph):
        super().__init__(graph.tensors, garbage_collect_values=True, graph=graph.fx)


class _Shapes(_Run):
    """Counts the MACs and the new bytes of every operator, and the most bytes that lived at the same time."""

    def __init__(self, graph: Graph):
        super().__init__(graph)
        self.weights = {tensor.untyped_storage().data_ptr() for _, tensor in graph.named_tensors()}
        self.macs: dict[fx.Node, int | None] = {}
        self.bytes: dict[fx.Node, int] = {}
        self.peak = 0

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            return super().run_node(n)
        before = self._storages(list(self.env.values()))
        result = super().run_node(n)
        new = {place: size for place, size in self._storages(result).items() if place not in before}
        self.peak = max(self.peak, sum(before.values()) + sum(new.values()))
        if n.op == "call_function":
            self.bytes[n] = sum(new.values())
            self.macs[n] = macs(n, self._arguments(n), result)
        return result

    def _storages(self, value: Any) -> dict[int, int]:
        """Bytes by address, weights left out."""
        storages = [tensor.untyped_storage() for tensor in tensors(value)]
        return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in self.weights}

    def _arguments(self, node: fx.Node) -> dict[str, Any]:
        if not isinstance(node.target, torch._ops.OpOverload):
            return {}
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        names = [argument.name for argument in node.target._schema.arguments]
        return dict(zip(names, args, strict=False)) | kwargs


class _Clock(_Run):
    """Notes how long every operator takes, one run after the other."""

    def __init__(self, graph: Graph):
        super().__init__(graph)
        self.times: dict[fx.Node, list[float]] = {}

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        begin = time.perf_counter()
        result = target(*args, **kwargs)
        _wait(result)
        self.seconds = time.perf_counter() - begin
        return result

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function":
            self.times.setdefault(n, []).append(self.seconds)
        return result


def _time(graph: Graph, leaves: list[Tensor]) -> tuple[dict[fx.Node, float], float]:
    """Milliseconds of every operator and of the whole graph: medians of runs in turns, after two that do not count."""
    clock, whole = _Clock(graph), list[float]()
    end = 0.0
    for run in range(_RUNS[1] + 2):
        if run == 2:
            clock.times.clear()
            whole.clear()
            end = time.perf_counter() + _SECONDS
        elif run > _RUNS[0] + 2 and time.perf_counter() > end:
            break
        clock.run(*leaves)
        begin = time.perf_counter()
        _wait(graph._run(graph.tensors, *leaves))
        whole.append(time.perf_counter() - begin)
    return {node: 1e3 * statistics.median(values) for node, values in clock.times.items()}, 1e3 * statistics.median(whole)


def _wait(result: Any) -> None:
    """Until the device has done what it was asked."""
    if any(tensor.is_cuda for tensor in tensors(result)):
        torch.cuda.synchronize()
