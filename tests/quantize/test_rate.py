"""Weights on coarse even grids: the entropy that was asked for, one step size a tensor, and training that holds the rate."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from multum.distill import Logits
from multum.errors import StepError, TrainError
from multum.graph import layers
from multum.graph.file import to_data
from multum.quantize import RateDistortion, WeightOnly
from multum.step import Recipe, compress
from multum.task import Task
from multum.train import Training, entropy, fit
from multum.train.rate import Rate


def network(width: int = 32) -> Task:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4),
    )  # fmt: skip
    data = [(torch.randn(16, 3, 10, 10), torch.randint(4, (16,))) for _ in range(40)]
    return Task(model.eval(), data[0][0], data, loss=nn.functional.cross_entropy)


def measured(graph) -> float:
    """Bits per weight of the stored integers that are coarse."""
    _, tensors = to_data(graph)
    coarse = [tensors[layer.weight] for layer in layers(graph) if layer.quantizer() and layer.name in ("3", "6")]
    return sum(t.numel() * float(entropy(t)) for t in coarse) / sum(t.numel() for t in coarse)


def test_entropy_by_hand() -> None:
    assert float(entropy(torch.tensor([0.0, 0, 0, 0]))) == 0
    assert float(entropy(torch.tensor([-1.0, 0, 0, 1]))) == pytest.approx(1.5)
    assert float(entropy(torch.arange(8.0) - 4)) == pytest.approx(3)


@given(bits=st.floats(0.1, 3.5))
@settings(max_examples=12, deadline=None)
def test_the_integers_have_the_entropy_that_was_asked_for(bits: float) -> None:
    graph = compress(network(), RateDistortion(bits=bits, rounding="nearest")).graph
    assert measured(graph) == pytest.approx(bits, abs=0.03)


def test_a_layer_has_one_step_size_in_proportion_to_its_weights_and_edges_are_fine() -> None:
    task = network()
    with torch.no_grad():
        task.model[3].weight.mul_(10)
    task = Task(task.model, task.example)
    graph = compress(task, RateDistortion()).graph
    first, second, third, last = (graph.tensor(f"{layer.weight}_scale") for layer in layers(graph) if layer.quantizer())
    assert second.unique().numel() == third.unique().numel() == 1
    ratio = graph.tensor("3.weight").detach().square().mean().sqrt() / graph.tensor("6.weight").detach().square().mean().sqrt()
    assert float(second[0] / third[0]) == pytest.approx(float(ratio), rel=1e-4)
    assert first.unique().numel() > 1
    assert last.unique().numel() > 1
    assert not second.requires_grad


def test_coded_size_follows_the_bits(tmp_path) -> None:
    import multum

    sizes = [
        multum.save(compress(network(64), RateDistortion(bits=bits, rounding="nearest")), tmp_path / "a.mip") for bits in (3.0, 1.5, 0.5)
    ]
    weights = 2 * 64 * 64 * 9
    assert sizes[0] - sizes[1] == pytest.approx(1.5 * weights / 8, rel=0.06)
    assert sizes[1] - sizes[2] == pytest.approx(1.0 * weights / 8, rel=0.06)


@pytest.mark.parametrize(("start", "bits"), [(1.5, 0.8), (2.5, 2.0)])
def test_training_brings_the_entropy_down_to_what_is_asked(start: float, bits: float) -> None:
    result = compress(network(), Recipe([RateDistortion(bits=start, rounding="nearest"), Logits(epochs=4, bits=bits)]))
    assert measured(result.graph) < 1.06 * bits
    assert result.records[-1].measured["bits"] <= 1.06 * bits


def test_training_without_a_rate_lets_the_file_grow_and_the_rate_forbids_it() -> None:
    free, held = (
        compress(network(), [RateDistortion(bits=0.6, rounding="nearest"), Logits(epochs=3, bits=bits)]).graph for bits in (None, 0.6)
    )
    assert measured(held) < 0.65
    assert measured(free) > measured(held)


def test_a_rate_that_is_not_exceeded_costs_nothing() -> None:
    task = network()
    graph = compress(task, RateDistortion(bits=1.0, rounding="nearest")).graph.requires_grad_(True)
    rate = Rate(3.0)
    rate.join(graph)
    for step in range(0, 400, 8):
        rate.before(step, 400)
    assert rate.multiplier < 1e-5


def test_the_term_falls_when_weights_shrink() -> None:
    graph = compress(network(), RateDistortion(bits=1.5, rounding="nearest")).graph.requires_grad_(True)
    rate = Rate(1.0)
    rate.join(graph)
    before = float(rate.term().detach())
    rate.term().backward()
    weight = graph.tensor("3.weight")
    assert torch.equal(weight.grad.sign(), weight.sign())
    with torch.no_grad():
        weight.mul_(0.5)
    assert float(rate.term().detach()) < before


def test_bits_need_quantized_weights() -> None:
    task = network()
    with pytest.raises(StepError, match="no weight is quantized"):
        compress(task, Logits(bits=1.0))
    with pytest.raises(TrainError, match="No weight is quantized"):
        fit(task.original.copy().requires_grad_(True), task, lambda i, o, t: o.sum(), Training(), companions=[Rate(1.0)])


@pytest.mark.parametrize("options", [{"bits": 0.0}, {"bits": 9.0}, {"bits": -1.0}, {"edges": 1}], ids=str)
def test_options_out_of_range_are_refused(options) -> None:
    with pytest.raises(StepError, match="Expected"):
        RateDistortion(**options)


def test_twice_is_refused() -> None:
    with pytest.raises(StepError, match="quantized already"):
        compress(network(), [WeightOnly(bits=4), RateDistortion()])
