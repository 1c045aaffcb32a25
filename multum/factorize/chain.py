"""Replacing one layer by a chain of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import Graph, Layer
from ..graph.model import aten


@dataclass(frozen=True, eq=False)
class Link:
    """A layer of a chain: `operator(input, weight, bias, *rest)`; of an embedding, `embedding(weight, input, *rest)`."""

    operator: Any
    weight: Tensor
    rest: tuple[Any, ...] = ()


def replace(graph: Graph, layer: Layer, value: fx.Node, bias: fx.Node | None, links: Sequence[Link]) -> None:
    """Puts the chain in the layer's place, in place; the bias goes with the last link.

    The new weights are trainable parameters named after the old one: of `conv.weight`, `conv.factor0.weight` and so on.
    """
    dtype = graph.tensor(layer.weight).dtype
    base = layer.weight.removesuffix(".weight")
    base += "_" if base == layer.weight else ""
    for place, link in enumerate(links):
        name = f"{base}.factor{place}.weight"
        graph.set_tensor(name, link.weight.to(dtype).contiguous(), parameter=True)
        weight = graph.attribute(name, layer.node)
        own = bias if place == len(links) - 1 else None
        args = (weight, value, *link.rest) if link.operator is aten.embedding.default else (value, weight, own, *link.rest)
        with graph.fx.inserting_before(layer.node):
            value = graph.fx.call_function(link.operator, args)
        value.meta = dict(layer.node.meta)
    layer.node.replace_all_uses_with(value)
    graph.clean()
    with torch.no_grad():
        graph.refresh()
