"""Operator by operator over all batches: the same results, changes on the way, and little memory."""

import torch
from torch import Tensor, nn

from multum import capture
from multum.graph import Graph
from multum.graph.model import aten
from multum.graph.sweep import Sweep, live_bytes


def network() -> Graph:
    torch.manual_seed(0)
    body = (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    return capture(nn.Sequential(*body), torch.zeros(2, 2, 6, 6)).requires_grad_(False)


def last(graph: Graph, sweep: Sweep) -> list[Tensor]:
    for node in sweep:
        if not any(user.op != "output" for user in node.users):
            return sweep.run(node)
    raise AssertionError


def test_the_results_are_those_of_the_graph() -> None:
    graph, batches = network(), [torch.randn(size, 2, 6, 6) for size in (3, 1)]
    for result, batch in zip(last(graph, Sweep(graph, batches)), batches, strict=True):
        assert torch.equal(result, graph(batch))


def test_what_is_changed_before_an_operator_runs_counts_and_what_ran_is_not_run_again() -> None:
    graph, batches = network(), [torch.randn(3, 2, 6, 6)]
    sweep = Sweep(graph, batches)
    for node in sweep:
        if node.target is aten.linear.default:
            graph.set_tensor("4.weight", graph.tensor("4.weight") * 2)
            result = sweep.run(node)
            assert sweep.run(node) is result
            break
    assert torch.equal(result[0], graph(batches[0]))


def test_results_are_freed_after_their_last_use() -> None:
    graph = network()
    sweep = Sweep(graph, [torch.randn(3, 2, 6, 6)])
    assert max(len(sweep.values) for _ in sweep) == 1


def test_live_bytes_by_hand() -> None:
    # of one image: the batch norm reads 4x4x4 numbers and makes as many
    assert live_bytes(network()) == 4 * max(2 * 36 + 64, 64 + 64, 64 + 3)
