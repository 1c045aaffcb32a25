"""Runs an exported file in its runtime and compares what it gives with the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ExportError
from ..graph import Graph, spec
from ..graph.capture import arguments
from ..graph.model import aten
from .onnx import batched

LEAST_COSINE = 0.999
LEAST_AGREEMENT = 0.99
_TIE = 0.02  # of the standard deviation of the outputs: two labels that are closer are equal to the graph
_SIZES = (1, 5, 10)  # batches of random inputs; different, because the batch is to be free
_ALIASES = (aten.view.default, aten.reshape.default, aten.to.dtype, aten._to_copy.default, aten.contiguous.default, aten.unsqueeze.default)
_PLAIN = {"Conv", "Gemm", "MatMul", "Add", "Sub", "Mul", "Div", "Relu", "Reshape", "Transpose", "Concat", "MaxPool", "Flatten", "Identity"}


@dataclass(frozen=True)
class Verification:
    """What an exported file computes, next to what the graph computes.

    `cosine` is the least over the outputs; `agreement` the share of samples (tokens, pixels) with the same label, the
    largest entry of the first output, where labels that the graph holds for equal count as the same; None without labels.
    """

    cosine: float
    agreement: float | None
    largest_difference: float
    samples: int


def verify(graph: Graph, model: bytes | str | Path, inputs: Iterable[Any] | None = None) -> Verification:
    """Compares an ONNX file, or its content, with the graph, on batches of inputs or, without any, on random ones.

    Raises ExportError, naming operators, when the cosine is below 0.999, or labels agree on less than 99 % of the samples;
    random inputs have no labels. Networks of few bits round noise otherwise here and there: give inputs.
    """
    content = model if isinstance(model, bytes) else Path(model).read_bytes()
    batches = [_leaves(graph, batch) for batch in inputs] if inputs is not None else list(_random(graph))
    if not batches:
        raise ExportError("No inputs are given to verify the export on.", "at least one batch", "give batches, or None for random ones")
    found = _compare(graph, _session(content), batches, labelled=inputs is not None)
    if not _holds(found):
        plain = _compare(graph, _session(content, optimized=False), batches, labelled=inputs is not None)
        agreement = "" if found.agreement is None else f", labels agree on {found.agreement:.1%} of {found.samples} samples"
        raise ExportError(
            f"The exported model computes something else than the graph: cosine {found.cosine:.5f}{agreement}.",
            f"cosine {LEAST_COSINE}, agreement {LEAST_AGREEMENT:.0%}",
            f"look at the operators {', '.join(_suspects(content, engine=_holds(plain)))}",
        )
    return found


def _holds(found: Verification) -> bool:
    flips = 0.0 if found.agreement is None else (1 - found.agreement) * found.samples
    return found.cosine >= LEAST_COSINE and flips <= max(1.0, (1 - LEAST_AGREEMENT) * found.samples) + 1e-6  # one flip proves nothing


@dataclass
class _Tally:
    """Sums over the batches for one output."""

    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))  # a·b, a·a, b·b
    largest: float = 0.0
    same: int = 0
    labels: int = 0

    def add(self, expected: Tensor, actual: Tensor) -> None:
        if expected.shape != actual.shape:
            self.largest = float("inf")
            return
        a, b = expected.double().flatten(), actual.double().flatten()
        finite = torch.isfinite(a) | torch.isfinite(b)  # a mask may be infinite in both
        a, b = a[finite], b[finite]
        self.sums += torch.stack([a @ b, a @ a, b @ b])
        self.largest = max(self.largest, float((a - b).abs().max()) if len(a) else 0.0)

    def add_labels(self, expected: Tensor, actual: Tensor) -> None:
        dim = 1 if expected.ndim == 4 else -1
        best = expected.max(dim).values
        chosen = expected.gather(dim, actual.argmax(dim, keepdim=True)).squeeze(dim)
        self.same += int((best - chosen <= _TIE * expected.std()).sum())
        self.labels += best.numel()

    def cosine(self) -> float:
        dot, a, b = self.sums.tolist()
        if self.largest == float("inf") or dot != dot:
            return 0.0
        return 1.0 if max(a, b) < 1e-20 else dot / max(a * b, 1e-40) ** 0.5


def _has_labels(value: Tensor) -> bool:
    return value.is_floating_point() and value.ndim > 1 and value.shape[1 if value.ndim == 4 else -1] > 1


def _compare(graph: Graph, run: Callable[[list[Tensor]], list[Tensor]], batches: Sequence[list[Tensor]], labelled: bool) -> Verification:
    was_training = graph.training
    graph.eval()
    device = next((tensor.device for _, tensor in graph.named_tensors()), torch.device("cpu"))
    tallies: list[_Tally] = []
    try:
        for batch in batches:
            with torch.no_grad():
                expected = [value.cpu() for value in graph._run(graph.tensors, *(leaf.to(device) for leaf in batch))]
            actual = run(batch)
            tallies = tallies or [_Tally() for _ in expected]
            for tally, a, b in zip(tallies, expected, actual, strict=True):
                tally.add(a, b)
            first = next((i for i, value in enumerate(expected) if _has_labels(value)), None)
            if labelled and first is not None:
                tallies[first].add_labels(expected[first], actual[first])
    finally:
        graph.train(was_training)
    labels = sum(tally.labels for tally in tallies)
    agreement = sum(tally.same for tally in tallies) / labels if labels else None
    samples = labels or sum(batch[0].shape[0] if batch[0].ndim else 1 for batch in batches)
    return Verification(min(tally.cosine() for tally in tallies), agreement, max(tally.largest for tally in tallies), samples)


def _session(content: bytes, optimized: bool = True) -> Callable[[list[Tensor]], list[Tensor]]:
    session = _open(content, optimized)
    ports = [port.name for port in session.get_inputs()]

    def run(leaves: list[Tensor]) -> list[Tensor]:
        try:
            outputs = session.run(None, {name: leaf.contiguous().numpy() for name, leaf in zip(ports, leaves, strict=True)})
        except Exception as error:
            raise ExportError(f"ONNX Runtime fails on the exported model: {error}", "a model that runs") from error
        return [torch.from_numpy(array) for array in outputs]

    return run


def _open(content: bytes, optimized: bool, dump: str = "") -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.optimized_model_filepath = dump
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime does not load the exported model: {error}", "a model that loads") from error


def _suspects(content: bytes, engine: bool) -> list[str]:
    """Types of operators: those the engine makes when it optimizes, if it alone is wrong, else those in the file beyond the plain ones."""
    import onnx

    kinds = {node.op_type for node in onnx.load_from_string(content).graph.node}
    if engine:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/optimized.onnx"
            _open(content, optimized=True, dump=path)
            made = {node.op_type for node in onnx.load(path).graph.node}
        return sorted(made - kinds) or sorted(made)
    return sorted(kinds - _PLAIN) or sorted(kinds)


def _leaves(graph: Graph, batch: Any) -> list[Tensor]:
    args, kwargs = arguments(batch)
    return [leaf.cpu() for leaf in spec.flatten((args, kwargs), graph.inputs)]


def _random(graph: Graph) -> Iterator[list[Tensor]]:
    """Batches of the captured shapes: normal numbers, valid rows of the tables that integers look up, and ones."""
    generator = torch.Generator().manual_seed(0)
    places = [node for node in graph.fx.nodes if node.op == "placeholder"]
    leaves = [node.meta["val"] for node in places]
    for size in _SIZES:
        batch = []
        for node, leaf, free in zip(places, leaves, batched(leaves), strict=True):
            shape = (size, *leaf.shape[1:]) if free else tuple(leaf.shape)
            if leaf.is_floating_point():
                batch.append(torch.randn(shape, generator=generator).to(leaf.dtype))
            elif rows := _rows(graph, node):
                batch.append(torch.randint(rows, shape, generator=generator).to(leaf.dtype))
            else:
                batch.append(torch.ones(shape, dtype=leaf.dtype))
        yield batch


def _rows(graph: Graph, node: Any) -> int:
    """The rows of the smallest table in which the integers of `node` are looked up; 0 when in none."""
    found = [
        int(user.args[0].meta["val"].shape[0]) for user in node.users if user.target is aten.embedding.default and user.args[1] is node
    ]
    found += [_rows(graph, user) for user in node.users if user.target in _ALIASES]
    return min(filter(None, found), default=0)
