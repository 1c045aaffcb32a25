"""Tensor trains: shapes by hand, exact where the matrix is one, and the tables that are never laid out."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from multum import Task, compress
from multum.errors import StepError
from multum.export import to_onnx_bytes, verify
from multum.factorize import TensorTrain
from multum.factorize.tensor_train import _folded, _macs, factored, joined, train
from multum.graph import layers


def test_shapes_and_costs_by_hand():
    assert factored(60, 24, 3, False) == [(5, 2), (4, 3), (3, 4)]
    assert factored(7, 6, 3, False) == [(7, 1), (1, 2), (1, 3)]
    assert factored(30522, 384, 3, True) == [(32, 6), (31, 8), (31, 8)]  # 30752 rows
    # vectors of 24 = 2 * 3 * 4: 12 places by [2, 10], then 5 * 4 by [6, 8], then 20 by [8, 3]
    assert _macs([(5, 2), (4, 3), (3, 4)], [2, 2]) == 12 * 2 * 10 + 20 * 6 * 8 + 20 * 8 * 3


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(2, 4), st.booleans())
def test_a_train_of_full_ranks_is_the_matrix(rows, columns, cores, padded):
    shapes = factored(rows, columns, cores, padded)
    assert math.prod(c for _, c in shapes) == columns
    assert rows <= math.prod(r for r, _ in shapes) <= (2 * rows + 8 if padded else rows)
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows), dtype=torch.double)
    cores = train(_folded(matrix, shapes), shapes, [10**6] * (cores - 1))
    torch.testing.assert_close(joined(cores)[:rows], matrix)


CASES = [
    (nn.Linear(24, 60), torch.randn(2, 5, 24)),
    (nn.Linear(24, 60), torch.randn(3, 24)),
    (nn.Linear(24, 60, bias=False), torch.randn(2, 3, 2, 24)),
    (nn.Embedding(100, 24), torch.randint(0, 100, (2, 7))),
    (nn.Embedding(100, 24), torch.arange(100)),
]


@pytest.mark.parametrize("cores", [2, 3])
@pytest.mark.parametrize(("module", "example"), CASES)
def test_a_train_of_rank_two_becomes_a_chain_that_computes_the_same(module, example, cores):
    step, example = TensorTrain(rank=2, cores=cores), example.clone()
    layer = layers(Task(nn.Sequential(module), example).original)[0]
    weight = module.weight.detach().double().movedim(layer.axis, 0)
    module.weight.data = step.dense(layer, weight, None, [2] * (cores - 1)).movedim(0, layer.axis).float()
    task = Task(nn.Sequential(module).eval(), example)
    result = compress(task, step)
    change = result.records[0].changes["0"]
    assert change["energy"] > 1 - 1e-9
    assert change["parameters"][1] == sum(result.graph.tensor(layer.weight).numel() for layer in layers(result.graph))
    assert [layer.name for layer in layers(result.graph)] == [f"0.factor{place}" for place in range(cores)]
    for x in (example, torch.cat([example, example.flip(0)])):
        torch.testing.assert_close(result.graph(x), task.original(x), rtol=1e-4, atol=1e-5)
    verify(result.graph, to_onnx_bytes(result.graph))


def test_rows_that_are_no_product_are_padded():
    module, x = nn.Embedding(97, 24), torch.arange(97)
    task, step = Task(nn.Sequential(module).eval(), x), TensorTrain(rank=9)
    wanted = step.dense(layers(task.original)[0], module.weight.detach().double().T, None, [9, 9]).T
    torch.testing.assert_close(compress(task, step).graph(x), wanted.float(), rtol=1e-4, atol=1e-5)


def test_a_table_is_never_laid_out():
    task = Task(nn.Sequential(nn.Embedding(4000, 64)), torch.randint(0, 4000, (2, 7)))
    graph = compress(task, TensorTrain(rank=4)).graph
    largest = max(node.meta["val"].numel() for node in graph.fx.nodes if node.op == "call_function" and hasattr(node.meta["val"], "numel"))
    assert largest <= 14 * 64 * 4  # what is asked for times the rank
    assert sum(p.numel() for p in graph.parameters()) < 4000 * 64 / 50


def test_the_cheapest_that_keeps_the_energy_is_taken_and_ranks_are_checked():
    task = Task(nn.Sequential(nn.Linear(64, 64)), torch.randn(2, 64))
    with pytest.raises(StepError, match=r"rank is 65, and the layer '0' has the full rank \[16, 16\]"):
        compress(task, TensorTrain(rank=65))
    with pytest.raises(StepError, match="cores is 1"):
        TensorTrain(cores=1)
    assert "cost no less" in TensorTrain(rank=16).plan(task.original, task).skipped["0"]
    change = TensorTrain(parameters=0.5).plan(task.original, task).changes["0"]
    assert change["parameters"][1] <= 2048
