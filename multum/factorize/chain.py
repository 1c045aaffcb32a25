"""Replacing one layer by a chain of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..graph import Graph, Layer
from ..graph.model import aten

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True, eq=False)
class Link:
    """A layer of a chain: `operator(input, weight, bias, *rest)`; of an embedding, `embedding(weight, input, *rest)`.

    `views` are operators with their second argument, reshapes and permutations, that lay out the input first.
    """

    operator: Any
    weight: Tensor
    rest: tuple[Any, ...] = ()
    views: tuple[tuple[Any, list[int]], ...] = ()


class Writer:
    """Adds operators to a graph, in front of the layer that they replace, or behind it, as if written where it was."""

    def __init__(self, graph: Graph, layer: Layer, after: bool = False):
        self.graph, self.layer, self.before = graph, layer, layer.node.next if after else layer.node
        self.dtype = graph.tensor(layer.weight).dtype
        base = layer.weight.removesuffix(".weight")
        self.base = base + ("_" if base == layer.weight else "")

    def call(self, target: Any, *args: Any) -> fx.Node:
        with self.graph.fx.inserting_before(self.before):
            node = self.graph.fx.call_function(target, args)
        node.meta = dict(self.layer.node.meta)
        return node

    def factor(self, place: int, value: Tensor) -> fx.Node:
        """A trainable parameter named after the old one: of `conv.weight`, `conv.factor0.weight` and so on."""
        name = f"{self.base}.factor{place}.weight"
        self.graph.set_tensor(name, value.to(self.dtype).contiguous(), parameter=True)
        return self.graph.attribute(name, self.before)

    def shaped(self, value: fx.Node, like: fx.Node, dims: int, last: int) -> fx.Node:
        """A value in the first `dims` sizes of another and one more."""
        sizes = [self.call(aten.sym_size.int, like, dim) for dim in range(dims)] if dims > 1 else [-1]
        return self.call(aten.reshape.default, value, [*sizes, last])

    def finish(self, value: fx.Node) -> None:
        """The value takes the layer's place."""
        self.layer.node.replace_all_uses_with(value)
        self.graph.clean()
        with torch.no_grad():
            self.graph.refresh()


def run(write: Writer, value: fx.Node, bias: fx.Node | None, links: Sequence[Link]) -> fx.Node:
    """What a chain makes of a value; the bias goes with the last link, unless that has views."""
    for place, link in enumerate(links):
        for target, argument in link.views:
            value = write.call(target, value, argument)
        weight = write.factor(place, link.weight)
        own = bias if place == len(links) - 1 and not link.views else None
        args = (weight, value, *link.rest) if link.operator is aten.embedding.default else (value, weight, own, *link.rest)
        value = write.call(link.operator, *args)
    return value


def replace(graph: Graph, layer: Layer, value: fx.Node, bias: fx.Node | None, links: Sequence[Link]) -> None:
    """Puts the chain in the layer's place, in place; the bias goes with the last link, or is added where that has views."""
    write, given = Writer(graph, layer), value
    value = run(write, value, bias, links)
    if links[-1].views:
        shape = layer.node.meta["val"].shape
        value = write.shaped(value, given, len(shape) - 1, shape[-1])
        value = value if bias is None else write.call(aten.add.Tensor, value, bias)
    write.finish(value)


def composed(links: Sequence[Link], shape: torch.Size) -> Tensor:
    """The one weight, of this shape, to which a chain without views comes; along each dimension one link at most has a window."""
    found = links[0].weight
    for link in links[1:]:
        if links[0].operator is aten.embedding.default:
            found = link.weight @ found.T
        elif link.operator is aten.linear.default:
            found = link.weight @ found
        else:
            window = link.weight.shape[2:]
            turned = link.weight.flip(list(range(2, link.weight.ndim)))
            groups = link.rest[3] if len(link.rest) > 3 else 1
            convolve = _CONVOLVE[len(window)]
            found = convolve(found.transpose(0, 1), turned, padding=[n - 1 for n in window], groups=groups).transpose(0, 1)
    return found.reshape(shape)
