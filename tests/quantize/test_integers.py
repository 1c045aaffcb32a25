"""Integers of weights that are chosen from data: biases make up for means that were lost."""

import pytest
import torch
from torch import Tensor, nn

from multum.errors import StepError
from multum.graph import Graph, layers
from multum.graph.file import quantized_weights, to_integers
from multum.graph.model import read
from multum.quantize import Static, WeightOnly
from multum.quantize.integers import choose_integers
from multum.quantize.rounding import ROUNDINGS
from multum.step import compress
from multum.task import Task


def alike(count: int, *shape: int, seed: int = 0) -> Tensor:
    """Samples whose channels have much in common, as those of a network do."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(shape[0], shape[0], generator=torch.Generator().manual_seed(9)) * 0.4 + 1
    return torch.einsum("ij,nj...->ni...", mix, torch.randn(count, *shape, generator=random).relu())


def small(model: nn.Module, *shape: int, data: bool = True) -> Task:
    batches = [(alike(32, *shape, seed=seed), torch.zeros(32)) for seed in range(4)]
    return Task(model, batches[0][0][:2], calibration=batches if data else None, validation=[(alike(64, *shape, seed=5), torch.zeros(64))])


def convolutions() -> Task:
    torch.manual_seed(0)
    body = (nn.Conv2d(6, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=12), nn.ReLU6())
    head = (nn.Conv2d(12, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, 2), nn.Flatten(), nn.Linear(8 * 12 * 12, 5))
    return small(nn.Sequential(*body, *head).eval(), 6, 10, 10)


def error(graph: Graph, task: Task) -> float:
    with torch.no_grad():
        return sum(float((graph(x) - task.original(x)).norm() / task.original(x).norm()) for x, _ in task.data("validation"))


@pytest.mark.parametrize("step", [WeightOnly, Static])
def test_data_keep_outputs_better_than_nearest(step: type[WeightOnly] | type[Static]) -> None:
    task, bits = convolutions(), {"bits" if step is WeightOnly else "weight_bits": 4}
    plain = error(compress(task, step(rounding="nearest", edges=4, **bits)).graph, task)
    assert error(compress(task, step(edges=4, **bits)).graph, task) < 0.7 * plain


@pytest.mark.parametrize("method", [name for name in ROUNDINGS if name != "nearest"])
def test_every_method_helps_and_says_how_much(method: str) -> None:
    task = convolutions()
    (record,) = compress(task, WeightOnly(bits=3, edges=3, rounding=method)).records
    assert set(record.measured["rounding"]) == {layer.name for layer in layers(task.original) if layer.kind in ("conv", "linear")}
    for found in record.measured["rounding"].values():
        assert 0 < found["rounded"] < found["nearest"] < 1


def test_biases_make_up_for_the_means_that_were_lost() -> None:
    torch.manual_seed(0)
    task = small(nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 12)), 12)
    x = torch.cat([x for x, _ in task.calibration])
    original = task.original.copy()
    graph = task.original.copy()
    entry = {"bits": 3, "rounding": "gptq"}
    choose_integers(graph, original, {"0": entry, "2": entry}, task, 128)
    shifted = (graph(x) - original(x)).detach()
    choose_integers(graph := task.original.copy(), original, {"0": entry, "2": entry}, task, 128, biases=False)
    assert shifted.mean(0).norm() < 0.01 * original(x).norm(dim=1).mean()
    assert shifted.mean(0).norm() < 0.2 * (graph(x) - original(x)).mean(0).norm()


def test_integers_stay_on_the_grid_that_was_asked_for() -> None:
    graph = compress(convolutions(), WeightOnly(bits=3, edges=3)).graph
    for name, node in quantized_weights(graph).items():
        value = graph.tensor(name).detach()
        levels = to_integers(value, graph, node)
        assert levels.abs().max() == read(node, "quant_max") == 3
        scale = graph.tensor(f"{name}_scale").detach()
        form = [-1 if dim == read(node, "axis") else 1 for dim in range(value.ndim)]
        assert torch.equal(levels * scale.reshape(form), value)


def test_the_defaults_look_at_data_where_bits_are_few_and_data_there() -> None:
    task = convolutions()
    entries = WeightOnly(bits=4).plan(task.original.copy(), task).changes
    assert [entry["weight"].get("rounding", "nearest") for entry in entries.values()] == ["nearest", "gptq", "gptq", "gptq", "nearest"]
    entries = WeightOnly(bits=4).plan(task.original.copy(), small(convolutions().model, 6, 10, 10, data=False)).changes
    assert all("rounding" not in entry["weight"] for entry in entries.values())


def test_tables_and_what_is_tied_to_them_are_rounded_to_nearest() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner = nn.Embedding(20, 8), nn.Linear(8, 8)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.inner(self.table(tokens)).relu() @ self.table.weight.T

    tokens = torch.randint(0, 20, (8, 5))
    task = Task(Tied(), tokens, calibration=[(tokens, 0)])
    entries = WeightOnly(bits=4, edges=4).plan(task.original.copy(), task).changes
    assert {name: entry["weight"].get("rounding") for name, entry in entries.items() if "rounding" in entry["weight"]} == {"inner": "gptq"}


def test_a_rounding_that_needs_data_says_so() -> None:
    task = small(nn.Linear(4, 4), 4, data=False)
    with pytest.raises(StepError, match="looks at data, of which the task 'model' has none"):
        compress(task, WeightOnly(rounding="energy"))


@pytest.mark.parametrize("step", [WeightOnly, Static])
def test_an_unknown_rounding_is_refused(step: type[WeightOnly] | type[Static]) -> None:
    with pytest.raises(StepError, match="one of auto, nearest, gptq, adaround, energy"):
        step(rounding="down")


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    torch.manual_seed(0)
    batches = [(torch.cat([torch.randn(16, 4), torch.zeros(16, 4)], 1), torch.zeros(16)) for _ in range(3)]
    task = Task(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), batches[0][0], calibration=batches, validation=batches)
    graph = compress(task, WeightOnly(bits=4, edges=4)).graph
    assert error(graph, task) < 1
    assert graph.tensor("0.weight")[:, 4:].abs().max() <= 1.2 * task.original.tensor("0.weight")[:, 4:].abs().max()
