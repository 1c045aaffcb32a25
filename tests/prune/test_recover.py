"""What was cut is made good on calibration data: exactly where it can be, and never so that it is worse."""

import pytest
import torch
from torch import Tensor, nn

from multum import Task, compress, prune
from multum.graph import surgery
from multum.prune import recover as recover_
from multum.prune.deviation import Deviation
from multum.prune.recover import inputs, recover_cut
from multum.testing.conformance import task as attentive


class Network(nn.Module):
    """Channels 4 to 7 of the stem are sums of the first four; a convolution and a normalization read them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.wide, self.norm, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)
        with torch.no_grad():
            self.stem.weight[4:] = (torch.randn(4, 4) @ self.stem.weight[:4].flatten(1)).reshape(4, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.wide(self.stem(x)))).mean((2, 3)))


@pytest.fixture(scope="module")
def task() -> Task:
    torch.manual_seed(1)
    model = Network()
    data = [(torch.randn(16, 3, 6, 6), torch.zeros(16)) for _ in range(4)]
    with torch.no_grad():
        for x, _ in data:
            model.train()(x)
    return Task(model.eval(), data[0][0], calibration=data)


def cut(task: Task, keep: dict[str, list[int]]) -> tuple[dict[str, object], float]:
    """What recovery did, and how far the outputs are off on data that it has not seen."""
    graph = task.original.copy()
    surgery.cut(graph, keep)
    told = recover_cut(graph, task.original, keep, task, 512)
    torch.manual_seed(2)
    return told, Deviation(task.original, [torch.randn(64, 3, 6, 6)])(graph)


def test_channels_that_are_sums_of_others_cost_nothing(task: Task) -> None:
    told, off = cut(task, {"stem:out": [0, 1, 2, 3]})
    assert told["recovery"] == "least squares"
    assert told["off_before"] > 0.1
    assert told["off_after"] < 1e-2
    assert off < 2e-2


def test_what_is_worse_on_samples_that_did_not_serve_is_undone(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(matrix: Tensor, errors: object) -> Tensor:
        return torch.full_like(matrix, float("nan"))

    monkeypatch.setattr(recover_, "least_squares", nothing)
    told, off = cut(task, {"stem:out": [0, 1, 2, 3]})
    assert told["recovery"] == "biases and statistics"
    assert told["off_after"] < told["off_before"]
    monkeypatch.setattr(recover_, "_unchanged", nothing)
    told, off = cut(task, {"stem:out": [0, 1, 2, 3]})
    graph = task.original.copy()
    surgery.cut(graph, {"stem:out": [0, 1, 2, 3]})
    torch.manual_seed(2)
    assert told["recovery"] == "none"
    assert told["off_after"] == told["off_before"]
    assert off == Deviation(task.original, [torch.randn(64, 3, 6, 6)])(graph)


def test_half_of_a_change_that_goes_too_far_is_made(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    pulls, right = list[Tensor](), recover_.least_squares

    def too_far_at_first(matrix: Tensor, errors: recover_.Errors) -> Tensor:
        pulls.append(errors.pull)
        return right(matrix, errors) if len(pulls) > 1 else torch.full_like(matrix, float("nan"))

    monkeypatch.setattr(recover_, "least_squares", too_far_at_first)
    told, _ = cut(task, {"stem:out": [0, 1, 2, 3]})
    assert told["recovery"] == "half of least squares"
    assert told["off_after"] < told["off_before"]
    torch.testing.assert_close(pulls[1], pulls[0] / 2)


def test_the_step_recovers_by_default_and_says_what_it_did(task: Task) -> None:
    made = compress(task, prune.Channels(multiple=1))
    assert made.records[0].measured["recovery"] == "least squares"
    assert made.records[0].measured["off_after"] < made.records[0].measured["off_before"]
    assert compress(task, prune.Channels(multiple=1, recover=False)).records[0].measured == {}
    assert compress(Task(task.model, task.example), prune.Channels(multiple=1)).records[0].measured == {}


def test_no_more_inputs_than_asked_for_or_than_fit(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [len(batch) for batch in inputs(task, 40, task.original)] == [16, 16, 8]
    monkeypatch.setattr(recover_, "MEMORY", 0)
    assert [len(batch) for batch in inputs(task, 40, task.original)] == [1]


def test_deviation_is_relative_and_infinite_for_what_is_not_finite(task: Task) -> None:
    batches = [torch.randn(5, 3, 6, 6), torch.randn(3, 3, 6, 6)]
    deviation, graph = Deviation(task.original, batches), task.original.copy()
    assert deviation(graph) == 0
    with torch.no_grad():
        wanted = task.original(torch.cat(batches)).double()
        graph.tensor("head.weight").mul_(0.5)
        graph.tensor("head.bias").mul_(0.5)
    expected = (0.5 * wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert deviation(graph) == pytest.approx(float(expected), rel=1e-4)
    graph.set_tensor("head.bias", torch.full((4,), float("nan")))
    assert deviation(graph) == float("inf")


def test_operators_that_the_cut_puts_in_are_passed_over() -> None:
    pytest.importorskip("transformers")
    (record,) = compress(attentive("convnext_v2"), prune.Neurons()).records  # whose norm over channels is written anew
    assert set(record.measured) == {"recovery", "off_before", "off_after"}
