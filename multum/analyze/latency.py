"""How long convolutions and linear layers take on this machine, at any width: measured at some, interpolated between."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..graph import Graph, Layer
from ..graph.matrix import data
from ..graph.model import aten, read, shape

_GRID = (0.25, 0.5, 0.75, 1.0)  # of a layer's outputs, and of its inputs
_RUNS, _SECONDS = (5, 40), 0.02  # of each size: at least and at most, and for how long
_MULTIPLES = (32, 16, 8, 4, 2)
_LIKED = 1.03  # times the least time per channel is as good as the least

Settings = tuple[Any, ...]
Part = tuple[Any, ...]  # an operator of a chain: its name and what it depends on


class Latencies:
    """Milliseconds of single layers, for one sample on `threads` threads, in ONNX Runtime; each kind of layer is measured once."""

    def __init__(self, graph: Graph, threads: int = 1):
        self.graph, self.threads = graph, threads
        self._tables: dict[Settings, npt.NDArray[np.float64]] = {}

    def covers(self, layer: Layer) -> bool:
        """Whether times are known for a layer: 1-D to 3-D convolutions and linear layers."""
        return layer.node.target in _CONVOLUTIONS or layer.node.target is aten.linear.default

    def ms(self, layer: Layer, sizes: Sequence[int]) -> float:
        """The time of a layer whose weight has these sizes; more and fewer groups of a convolution go with its outputs."""
        whole = self.graph.tensor(layer.weight).shape
        settings = _settings(layer)
        key = (*settings, *whole)
        if key not in self._tables:
            self._tables[key] = self._table(settings, tuple(whole))
        rows = [np.interp(sizes[1], _grid(whole[1]), row) for row in self._tables[key]]
        return float(np.interp(sizes[0], _grid(whole[0]), rows))

    def multiple(self, layer: Layer) -> int:
        """The multiple of widths at which the engine is as fast for each output as at any, around two thirds of the layer's width."""
        outputs, *rest = self.graph.tensor(layer.weight).shape
        settings, middle = _settings(layer), 2 * outputs // 3
        if settings[-1] > 1:
            return 8
        spent = {
            step: min(_measured(settings, (width, *rest), self.threads) / width for width in _near(middle, step, outputs))
            for step in (*_MULTIPLES, 1)
        }
        least = min(spent.values())
        return next(step for step in sorted(spent) if spent[step] <= _LIKED * least)

    def _table(self, settings: Settings, whole: tuple[int, ...]) -> npt.NDArray[np.float64]:
        """[outputs, inputs] of the grid."""
        times = [[_measured(settings, (o, i, *whole[2:]), self.threads) for i in _grid(whole[1])] for o in _grid(whole[0])]
        return np.array(times)


_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


def _grid(size: int) -> list[int]:
    return [max(1, round(size * share)) for share in _GRID]


def _near(width: int, step: int, most: int) -> list[int]:
    """Some widths about `width` that are multiples of `step` and of no more than that."""
    found = [w for w in range(step, most + 1, step) if step == 32 or w % (2 * step)]
    return sorted(found, key=lambda w: abs(w - width))[:3] or [most]


def _settings(layer: Layer) -> Settings:
    """What a layer's time depends on besides its widths: the sizes of its input without channels, and the window's ways."""
    sizes = shape(data(layer))
    if layer.kind == "linear":
        return ("linear", int(np.prod([int(size) for size in sizes[1:-1]])), 1)
    window = len(sizes) - 2
    ways = (_each(read(layer.node, name), window) for name in ("stride", "padding", "dilation"))
    return ("conv", tuple(int(size) for size in sizes[2:]), *ways, int(read(layer.node, "groups")))


def _each(value: Any, count: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return tuple(int(v) for v in (values * count if len(values) == 1 else values))


@cache
def _measured(settings: Settings, weight: tuple[int, ...], threads: int) -> float:
    """Milliseconds of one layer, the median of some runs."""
    shape_in, part = _part(settings, weight)
    return chains(shape_in, ((part,),), threads)[0]


def whole(graph: Graph, layer: Layer) -> tuple[tuple[int, ...], Part]:
    """The shape of what a layer reads, for one sample, and the layer as a part of a chain."""
    outputs, inputs = layer.axis, 1 - layer.axis
    sizes = graph.tensor(layer.weight).shape
    return _part(_settings(layer), (sizes[outputs], sizes[inputs], *sizes[2:]))


@cache
def chains(shape_in: tuple[int, ...], which: tuple[tuple[Part, ...], ...], threads: int = 1) -> tuple[float, ...]:
    """Milliseconds of chains of operators that read an input of this shape, in ONNX Runtime; medians of runs in turn.

    A part is ("linear", outputs, inputs), ("conv", sizes of the weight, strides, pads, dilations, groups), ("reshape", sizes) or
    ("permute", dimensions). What was measured once is not measured again.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    sessions = [ort.InferenceSession(_model(shape_in, parts), options, providers=["CPUExecutionProvider"]) for parts in which]
    feed = {"x": np.random.default_rng(0).standard_normal(shape_in).astype(np.float32)}
    times: list[list[float]] = [[] for _ in which]
    end = float("inf")
    for run in range(_RUNS[1]):
        for own, session in zip(times, sessions, strict=True):
            begin = time.perf_counter()
            session.run(None, feed)
            own.append(time.perf_counter() - begin)
        if run == 1:  # these two do not count
            times, end = [[] for _ in which], time.perf_counter() + _SECONDS * len(which)
        elif len(times[0]) >= _RUNS[0] and time.perf_counter() > end:
            break
    return tuple(1e3 * statistics.median(own) for own in times)


def _part(settings: Settings, weight: tuple[int, ...]) -> tuple[tuple[int, ...], Part]:
    if settings[0] == "linear":
        return (1, max(1, settings[1]), weight[1]), ("linear", weight[0], weight[1])
    _, sizes, strides, padding, dilations, groups = settings
    groups = weight[0] if groups > 1 and weight[1] == 1 else groups
    outputs = max(1, weight[0] // groups) * groups
    return (1, weight[1] * groups, *sizes), ("conv", (outputs, *weight[1:]), strides, padding * 2, dilations, groups)


def _model(shape_in: tuple[int, ...], parts: tuple[Part, ...]) -> bytes:
    """An ONNX model of a chain."""
    from onnx import TensorProto, helper, numpy_helper

    random, nodes, held = np.random.default_rng(0), [], []
    for place, (kind, *rest) in enumerate(parts):
        names, last = [f"v{place}" if place else "x", f"w{place}"], f"v{place + 1}" if place + 1 < len(parts) else "y"
        value: npt.NDArray[Any] | None = None
        made: tuple[str, dict[str, Any]] = ("Transpose", {"perm": rest[0]})
        if kind == "linear":
            value, made = random.standard_normal((rest[1], rest[0])).astype(np.float32), ("MatMul", {})
        elif kind == "conv":
            value = np.asarray(random.standard_normal(rest[0]), np.float32)
            made = ("Conv", dict(zip(("strides", "pads", "dilations", "group"), rest[1:], strict=True)))
        elif kind == "reshape":
            value, made = np.array(rest[0], np.int64), ("Reshape", {})
        if value is not None:
            held.append(numpy_helper.from_array(value, names[1]))
        nodes.append(helper.make_node(made[0], names[: 1 + (value is not None)], [last], **made[1]))
    ends = [helper.make_tensor_value_info(*end) for end in (("x", TensorProto.FLOAT, shape_in), ("y", TensorProto.FLOAT, None))]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], held)
    return bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString())
