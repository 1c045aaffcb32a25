"""Zeros that are meant stay: through any step, training and the file."""

import json

import pytest
import torch
from torch import nn

from multum import Graph, capture
from multum.graph.file import from_data, to_data
from multum.graph.sparse import sparse_weights, sparsify, zeros_frozen, zeros_kept


@pytest.fixture
def graph() -> Graph:
    made = capture(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.zeros(2, 4)).requires_grad_(True)
    sparsify(made, "0.weight", torch.arange(24).reshape(6, 4) % 2 == 0)
    return made


def zero(graph: Graph) -> bool:
    return bool((graph.tensor("0.weight").flatten()[::2] == 0).all()) and bool((graph.tensor("0.weight").flatten()[1::2] != 0).any())


def test_they_are_part_of_the_graph(graph: Graph) -> None:
    rebuilt = from_data(*json.loads(json.dumps([to_data(graph)[0]])), to_data(graph)[1])
    for other in (graph, graph.copy(), rebuilt):
        assert zero(other)
        assert sparse_weights(other) == ["0.weight"]
    other = graph.copy()
    other.sparse = frozenset()
    assert other.fingerprint() != graph.fingerprint()


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, lambda p, rate: torch.optim.SGD(p, rate, 0.9, nesterov=True, weight_decay=0.1)])
def test_an_optimizer_does_not_move_them_and_moves_the_others(graph: Graph, optimizer) -> None:
    before, weights = graph.tensor("0.weight").detach().clone(), list(graph.parameters())
    steps = optimizer(weights, 0.1)
    with zeros_frozen(graph):
        for _ in range(3):
            graph(torch.randn(8, 4)).square().sum().backward()
            steps.step()
            steps.zero_grad()
    assert zero(graph)
    assert not torch.equal(graph.tensor("0.weight"), before)
    graph(torch.randn(8, 4)).square().sum().backward()
    assert graph.tensor("0.weight").grad.flatten()[::2].any()  # outside they have a gradient again


def test_whatever_sets_them_they_are_zero_again(graph: Graph) -> None:
    with zeros_kept(graph):
        graph.set_tensor("0.weight", torch.ones(6, 4))
        graph.set_tensor("2.weight", torch.zeros(2, 6))
    assert zero(graph)
    assert sparse_weights(graph) == ["0.weight"]


def test_a_tensor_of_another_shape_is_another_tensor(graph: Graph) -> None:
    with zeros_kept(graph):
        graph.set_tensor("0.weight", torch.ones(5, 4))
    assert graph.tensor("0.weight").all()
