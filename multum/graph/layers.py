"""The layers of a graph: every operator that owns a weight, and how to choose among them by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, fx

from ..errors import StepError, near
from .model import Graph, aten, read

# kind -> operator -> (position of the weight, position of the bias or None, dimension of the weight that makes the outputs)
_CONV = {
    getattr(op, overload): (1, 2, 0) for op in (aten.conv1d, aten.conv2d, aten.conv3d) for overload in ("default", "padding")
} | dict.fromkeys((aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input), (1, 2, 1))
_LINEAR = {aten.linear.default: (1, 2, 0), aten.addmm.default: (2, 0, 1), aten.matmul.default: (1, None, 1), aten.mm.default: (1, None, 1)}
_EMBEDDING = {aten.embedding.default: (0, None, 1)}
_NORM = {
    aten.batch_norm.default: (1, 2, 0),
    aten.layer_norm.default: (2, 3, 0),
    aten.group_norm.default: (2, 3, 0),
    aten.instance_norm.default: (1, 2, 0),
    aten.rms_norm.default: (2, None, 0),
}
_RNN = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
KINDS = {"conv": _CONV, "linear": _LINEAR, "embedding": _EMBEDDING, "norm": _NORM}

# Operators through which a weight reaches its layer unchanged in meaning: formats of numbers, and a transpose.
QUANTIZERS = (
    aten.fake_quantize_per_channel_affine.default,
    aten._fake_quantize_learnable_per_channel_affine.default,
    aten.fake_quantize_per_tensor_affine.tensor_qparams,
    aten._fake_quantize_learnable_per_tensor_affine.default,
)
_TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default)


@dataclass(frozen=True, eq=False)
class Layer:
    """An operator with a weight.

    `axis` is the dimension of the weight that makes the outputs; `weight` and `bias` are names of tensors in the graph.
    A recurrent layer has one `Layer` for each of its weight matrices.
    """

    name: str
    kind: str
    node: fx.Node
    weight: str
    bias: str | None
    axis: int
    position: int  # of the weight among the arguments of `node`

    @property
    def scale_axis(self) -> int:
        """The dimension of the weight in which a quantizer has its scales: the outputs; of an embedding, the rows."""
        return 0 if self.kind == "embedding" else self.axis

    def quantizer(self) -> fx.Node | None:
        """The fake-quantization node of the weight, if it has one."""
        return next((node for node in _path(_operand(self)) if node.target in QUANTIZERS), None)


def layers(graph: Graph) -> list[Layer]:
    """The layers in order of execution. A weight that several operators use gives a layer for each use."""
    found: list[Layer] = []
    names: dict[str, int] = {}
    for node in graph.fx.nodes:
        for kind, weight, bias, axis, position in _weights(node):
            name = _name(node, weight)
            names[name] = names.get(name, 0) + 1
            if names[name] > 1:
                name = f"{name}:{names[name]}"
            found.append(Layer(name, kind, node, weight, bias, axis, position))
    return found


def select(graph: Graph, include: str | Sequence[str] = "*", exclude: str | Sequence[str] = (), kinds: Sequence[str] = ()) -> list[Layer]:
    """The layers whose name matches a glob pattern of `include` and none of `exclude`, of these kinds (all when empty).

    Raises StepError, with the near misses, for a pattern that matches no layer of these kinds.
    """
    known = [layer for layer in layers(graph) if not kinds or layer.kind in kinds]
    wanted, unwanted = ((p,) if isinstance(p, str) else tuple(p) for p in (include, exclude))
    for pattern in (*wanted, *unwanted):
        if pattern != "*" and not any(fnmatchcase(layer.name, pattern) for layer in known):
            raise StepError(
                f"The pattern {pattern!r} matches no layer{' of kind ' + ', '.join(kinds) if kinds else ''}.",
                f"one of the layers of the model, such as {near(pattern, [layer.name for layer in known])}",
                "list them with: multum analyze TASK",
            )
    return [
        layer
        for layer in known
        if any(fnmatchcase(layer.name, p) for p in wanted) and not any(fnmatchcase(layer.name, p) for p in unwanted)
    ]


def source(node: object) -> str | None:
    """The tensor that `node` reads, seen through quantizers and transposes; None when it is computed from data."""
    if not isinstance(node, fx.Node):
        return None
    *_, last = _path(node)
    return str(last.target) if last.op == "get_attr" else None


def weight(graph: Graph, layer: Layer) -> Tensor:
    """The layer's weight as the graph holds it, not quantized."""
    return graph.tensor(layer.weight)


def _path(node: fx.Node) -> Iterator[fx.Node]:
    """The node and what it comes from, through quantizers and transposes."""
    yield node
    while node.target in QUANTIZERS or node.target in _TRANSPOSES:
        before = node.args[0]
        assert isinstance(before, fx.Node)
        node = before
        yield node


def _operand(layer: Layer) -> fx.Node:
    operand = layer.node.args[layer.position]
    if isinstance(operand, list | tuple):  # the weights of a recurrent layer come as one list
        operand = next(part for part in operand if source(part) == layer.weight)
    assert isinstance(operand, fx.Node)
    return operand


def _weights(node: fx.Node) -> Iterator[tuple[str, str, str | None, int, int]]:
    """Kind, weight, bias, output dimension and position for every weight of an operator."""
    if node.op != "call_function":
        return
    for kind, table in KINDS.items():
        if node.target in table:
            position, bias_position, axis = table[node.target]
            operand = node.args[position] if position < len(node.args) else read(node, "weight")
            if (name := source(operand)) is None:
                return
            if kind == "linear" and isinstance(operand, fx.Node) and sum(part.target in _TRANSPOSES for part in _path(operand)) % 2:
                axis = 1 - axis
            bias = None if bias_position is None or bias_position >= len(node.args) else source(node.args[bias_position])
            yield kind, name, bias, axis, position
    if node.target in _RNN:
        for part in node.args[2]:  # type: ignore[union-attr]
            name = source(part)
            if name and isinstance(part, fx.Node) and part.meta["val"].ndim == 2:
                yield "rnn", name, None, 0, 2


def _name(node: fx.Node, weight: str) -> str:
    """The path of the user's module: where the operator was written when the weight belongs there, else the weight's."""
    if node.target in _RNN:
        return weight
    owner = weight.rpartition(".")[0] or weight
    where = str(node.meta.get("module") or "")
    return where if where and weight != where and not owner.startswith(where) and not where.startswith(owner) else owner
