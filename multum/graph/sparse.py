"""Weights that were set to zero on purpose: every zero of a tensor named in `graph.sparse` stays zero, whatever is done to it later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .model import Graph


@contextmanager
def zeros_kept(graph: Graph) -> Iterator[None]:
    """Whatever happens inside, in the end the zeros of sparse weights are zeros again, where a tensor of that name and shape is left."""
    before = {name: graph.tensor(name).detach() == 0 for name in sparse_weights(graph)}
    yield
    left = dict(graph.named_tensors())
    for name, zero in before.items():
        if name in left and left[name].shape == zero.shape:
            left[name].detach().masked_fill_(zero.to(left[name].device), 0)


@contextmanager
def zeros_frozen(graph: Graph) -> Iterator[None]:
    """Inside, the zeros of sparse weights get no gradient: no optimizer that starts anew moves them, nor does weight decay."""
    handles = []
    for name in sparse_weights(graph):
        weight = graph.tensor(name)
        if weight.requires_grad:

            def hidden(gradient: Tensor, weight: Tensor = weight) -> Tensor:
                return gradient.masked_fill(weight.detach() == 0, 0)

            handles.append(weight.register_hook(hidden))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def sparsify(graph: Graph, name: str, zero: Tensor) -> None:
    """Sets a weight to zero, for good, where `zero` [its shape] is True."""
    graph.tensor(name).detach().masked_fill_(zero.to(graph.tensor(name).device), 0)
    graph.sparse |= {name}


def sparse_weights(graph: Graph) -> list[str]:
    """The sparse weights that the graph still has, sorted."""
    return sorted(graph.sparse & {name for name, _ in graph.named_tensors()})
