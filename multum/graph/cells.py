"""Single steps of recurrent layers, written out in the operators that they are made of, so that their weights belong to linear layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from .model import aten


def _both(x: Any, h: Any, weights: Sequence[Any]) -> tuple[Any, Any]:
    """What the input and the state give, each with its weight and bias."""
    w_ih, w_hh, b_ih, b_hh = (*weights, None, None)[:4]
    return aten.linear.default(x, w_ih, b_ih), aten.linear.default(h, w_hh, b_hh)


def _lstm(x: Any, states: Sequence[Any], *weights: Any) -> tuple[Any, Any]:
    hidden, cell = states
    gates = aten.chunk.default(aten.add.Tensor(*_both(x, hidden, weights)), 4, 1)
    enter, forget, exit_ = (aten.sigmoid.default(gates[place]) for place in (0, 1, 3))
    cell = aten.add.Tensor(aten.mul.Tensor(forget, cell), aten.mul.Tensor(enter, aten.tanh.default(gates[2])))
    return aten.mul.Tensor(exit_, aten.tanh.default(cell)), cell


def _gru(x: Any, h: Any, *weights: Any) -> Any:
    given, before = (aten.chunk.default(part, 3, 1) for part in _both(x, h, weights))
    reset, keep = (aten.sigmoid.default(aten.add.Tensor(given[place], before[place])) for place in (0, 1))
    new = aten.tanh.default(aten.add.Tensor(given[2], aten.mul.Tensor(reset, before[2])))
    return aten.add.Tensor(aten.mul.Tensor(aten.sub.Tensor(h, new), keep), new)


def _tanh(x: Any, h: Any, *weights: Any) -> Any:
    return aten.tanh.default(aten.add.Tensor(*_both(x, h, weights)))


def _relu(x: Any, h: Any, *weights: Any) -> Any:
    return aten.relu.default(aten.add.Tensor(*_both(x, h, weights)))


CELLS: dict[Any, Callable[..., Any]] = {
    aten.lstm_cell.default: _lstm,
    aten.gru_cell.default: _gru,
    aten.rnn_tanh_cell.default: _tanh,
    aten.rnn_relu_cell.default: _relu,
}


def write_out(cell: Any, operators: fx.Graph, args: Sequence[Any]) -> tuple[Any, list[fx.Node]]:
    """Appends the operators of a cell to a graph: its results (a node, or a tuple of them), and all new nodes."""
    before = len(operators.nodes)
    tracer = fx.proxy.GraphAppendingTracer(operators)
    proxies: Any = fx.map_arg(tuple(args), lambda node: fx.Proxy(node, tracer))  # type: ignore[arg-type, return-value]
    results = CELLS[cell](*proxies)
    new = list(operators.nodes)[before:]
    return (tuple(part.node for part in results) if isinstance(results, tuple) else results.node), new
