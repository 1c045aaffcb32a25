"""Where activations are quantized: decided from the graph alone, so that integer kernels form chains and sensitive sums stay float.

An engine runs a convolution in integers only when its input and its output are on a grid, an addition when both inputs and the
output are, a linear layer when its input is. So a convolution makes an *integer value*: its result, after a clipping activation,
is quantized for everybody. Sums, products, concatenations and averages of integer values make integer values again, unless a
normalization reads them. Everything else stays float and is quantized only on its way into a layer, so in a transformer the
residual stream, softmax, normalizations and activation functions keep their precision.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, fx

from ..graph.fuse import zero_pad
from ..graph.layers import KINDS, QUANTIZERS, Layer
from ..graph.matrix import data
from ..graph.model import aten

# Clipping functions: an engine merges them into the rounding of the operator before.
_CLIPS = (aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default)
_VIEWS = (
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.squeeze.dim, aten.squeeze.default, aten.unsqueeze.default,
    aten.permute.default, aten.transpose.int, aten.expand.default, aten.slice.Tensor, aten.select.int, aten.narrow.default,
    aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.flip.default,
    aten.contiguous.default, aten.clone.default, aten.dropout.default, aten.pixel_shuffle.default, aten.pixel_unshuffle.default,
    aten.channel_shuffle.default, aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec,
)  # fmt: skip
_MAXIMA = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default, aten.adaptive_max_pool2d.default)
# Results are among the inputs, so they lie on the same grid.
_PASSES = (*_CLIPS, *_VIEWS, *_MAXIMA)
_CATS = (aten.cat.default, aten.concat.default, aten.stack.default)
# Results have a grid of their own.
_JOINS = (
    *_CATS, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor,
    aten.mean.dim, aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default, aten.upsample_bilinear2d.vec,
    aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default,
    aten.sigmoid.default, aten.tanh.default, aten.hardsigmoid.default, aten.silu.default, aten.hardswish.default,
    aten.leaky_relu.default, aten.elu.default,
)  # fmt: skip
# Engines compute these in float, so nothing is gained by rounding what they read.
FLOAT = (
    aten.scaled_dot_product_attention.default, aten.matmul.default, aten.bmm.default, aten.softmax.int, aten.log_softmax.int,
    aten.gelu.default, aten.layer_norm.default, aten.group_norm.default, aten.rms_norm.default,
    aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input,
)  # fmt: skip


@dataclass
class Placement:
    """The values to quantize, each with the operators that read it quantized: all of them when the set is None."""

    readers: dict[fx.Node, set[fx.Node] | None] = field(default_factory=dict)
    leader: dict[fx.Node, fx.Node] = field(default_factory=dict)
    maker: dict[fx.Node, fx.Node] = field(default_factory=dict)  # the operator before a clipping activation

    def root(self, value: fx.Node) -> fx.Node:
        """The value whose scale and zero point this one shares."""
        while (above := self.leader.get(value, value)) is not value:
            value = above
        return value

    def share(self, value: fx.Node, other: fx.Node) -> None:
        self.leader[self.root(value)] = self.root(other)

    def want(self, value: fx.Node, reader: fx.Node) -> None:
        """Lets `reader` see `value` quantized."""
        if value.op == "get_attr" or value.target in QUANTIZERS:
            return
        readers = self.readers.setdefault(value, set())
        if readers is not None:
            readers.add(reader)


def place(graph: fx.Graph, layers: Iterable[Layer]) -> Placement:
    """Where to quantize activations for these layers to run in integers."""
    chosen = {layer.node: layer for layer in layers if layer.kind in ("conv", "linear")}
    placement, integers = Placement(), set[fx.Node]()
    for node in graph.nodes:
        operands = _operands(node)
        if node in chosen:
            placement.want(*_before_padding(chosen[node]))
            if chosen[node].kind == "conv":
                integers.add(_quantize_result(placement, node))
        elif node in integers or not operands or not all(part in integers for part in operands):
            continue
        elif node.target in _PASSES or _is_getitem(node) or zero_pad(node) is not None:
            integers.add(node)
            placement.share(node, operands[0])
        elif node.target in _JOINS and not _feeds_norm(node):
            for part in operands:
                placement.want(part, node)
            result = _quantize_result(placement, node)
            integers.add(result)
            for part in operands if node.target in _CATS else ():
                placement.share(part, result)
    return placement


def _before_padding(layer: Layer) -> tuple[fx.Node, fx.Node]:
    """The value that a layer reads quantized, and its reader. Engines merge zeros around it into a convolution, so they come after."""
    value, reader = data(layer), layer.node
    while zero_pad(value) is not None:
        value, reader = value.all_input_nodes[0], value
    return value, reader


def _quantize_result(placement: Placement, node: fx.Node) -> fx.Node:
    """Quantizes what an operator makes, for everybody: after the clipping activation when that alone reads it."""
    reader = next(iter(node.users), node)
    value = reader if len(node.users) == 1 and reader.target in _CLIPS else node
    placement.readers[value] = None
    placement.maker[value] = node
    return value


def _operands(node: fx.Node) -> list[fx.Node]:
    """The inputs that are tensors or lists of tensors (sizes are not)."""
    return [part for part in node.all_input_nodes if isinstance(part.meta.get("val"), Tensor | tuple | list)]


def _is_getitem(node: fx.Node) -> bool:
    return node.target is operator.getitem and isinstance(node.meta.get("val"), Tensor)


def _feeds_norm(node: fx.Node) -> bool:
    return any(user.target in KINDS["norm"] or (user.target in _PASSES and _feeds_norm(user)) for user in node.users)
