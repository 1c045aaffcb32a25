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
    """Milliseconds, the median of some runs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    model, feed = _model(settings, weight)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    times: list[float] = []
    end = float("inf")
    for run in range(_RUNS[1]):
        begin = time.perf_counter()
        session.run(None, {"x": feed})
        times.append(time.perf_counter() - begin)
        if run == 1:  # these two do not count
            times, end = [], time.perf_counter() + _SECONDS
        elif len(times) >= _RUNS[0] and time.perf_counter() > end:
            break
    return 1e3 * statistics.median(times)


def _model(settings: Settings, weight: tuple[int, ...]) -> tuple[bytes, npt.NDArray[np.float32]]:
    """An ONNX model of the one layer, and an input for it."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    if settings[0] == "linear":
        shape_in: tuple[int, ...] = (1, max(1, settings[1]), weight[1])
        values, node = random.standard_normal((weight[1], weight[0])), helper.make_node("MatMul", ["x", "w"], ["y"])
    else:
        _, sizes, strides, padding, dilations, groups = settings
        groups = weight[0] if groups > 1 and weight[1] == 1 else groups
        outputs = max(1, weight[0] // groups) * groups
        shape_in, values = (1, weight[1] * groups, *sizes), random.standard_normal((outputs, *weight[1:]))
        ways = {"strides": strides, "pads": padding * 2, "dilations": dilations, "group": groups}
        node = helper.make_node("Conv", ["x", "w"], ["y"], **ways)
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape_in)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(values.astype(np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString(), random.standard_normal(shape_in).astype(np.float32)
