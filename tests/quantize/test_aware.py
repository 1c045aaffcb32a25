"""Training that knows of the grids of weights and activations."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import multum
from multum.errors import MultumError, StepError
from multum.export import to_onnx_bytes, verify
from multum.graph import layers
from multum.graph.file import from_data, to_data
from multum.graph.layers import QUANTIZERS, source
from multum.graph.model import aten, read
from multum.lighten import Reparameterize
from multum.prune import Gradual, Shrink, Weights
from multum.quantize import Aware, Binary, Static
from multum.quantize.midrise import Midrise, fitted, odd_integers
from multum.step import compress
from multum.task import Task


def rings() -> Task:
    """Points in the plane, inside or outside of a circle; a network with batch normalization that was trained on them."""
    torch.manual_seed(0)
    x = torch.randn(1024, 2)
    y = (x.norm(dim=1) > 1.2).long()
    body = [nn.Linear(2, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 2)]
    model = nn.Sequential(*body)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(80):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    batches = [(x[i : i + 64], y[i : i + 64]) for i in range(0, 1024, 64)]
    return Task(model.eval(), x[:2], train=batches, calibration=batches[:4], loss=F.cross_entropy)


def error(graph: object, task: Task) -> float:
    x = torch.cat([x for x, _ in task.train])
    with torch.no_grad():
        return float((graph(x).softmax(1) - task.original(x).softmax(1)).abs().mean())


def test_training_gives_back_what_two_bits_take() -> None:
    task, options = rings(), {"weight_bits": 2, "activation_bits": 2, "edges": 4}
    start = compress(task, Aware(**options, epochs=1e-9, learning_rate=1e-12)).graph
    trained = compress(task, Aware(**options, epochs=20.0, learning_rate=1e-2))
    assert error(trained.graph, task) < 0.65 * error(start, task)
    (record,) = trained.records
    assert record.measured["loss_last"] < record.measured["loss_first"]


@pytest.mark.parametrize("ranges", ["lsq", "pact", "fixed"])
def test_what_is_left_are_integers_and_plain_scales(ranges: str) -> None:
    graph = compress(rings(), Aware(weight_bits=3, activation_bits=3, edges=4, ranges=ranges)).graph
    assert [layer.kind for layer in layers(graph)] == ["linear"] * 3  # batch normalization is folded
    assert not graph.find(aten.minimum.default, aten._fake_quantize_learnable_per_tensor_affine.default)
    values = [node for node in graph.find(*QUANTIZERS) if source(node) is None]
    assert [(read(node, "quant_min"), read(node, "quant_max")) for node in values] == [(-7, 7), (0, 7), (0, 15)]
    data, tensors = to_data(graph)
    assert sorted(data["integers"]) == sorted(layer.weight for layer in layers(graph))
    assert [int(tensors[layer.weight].abs().max()) for layer in layers(graph)] == [7, 3, 7]
    x = torch.randn(8, 2)
    with torch.no_grad():
        assert torch.equal(from_data(data, tensors)(x), graph(x))


def test_a_scale_that_learns_moves_and_one_that_is_fixed_stays() -> None:
    task = rings()
    before = {
        entry["value"]: entry["scale"]
        for change in Aware().plan(task.original.copy(), task).changes.values()
        for entry in [change["input"]]
    }
    for ranges, moves in (("lsq", True), ("pact", True), ("fixed", False)):
        graph = compress(task, Aware(ranges=ranges, learning_rate=1e-2)).graph
        after = {name: float(graph.tensor(f"activations.{name}.scale")) for name in before}
        assert any(abs(after[name] / before[name] - 1) > 1e-3 for name in before) == moves, ranges


def test_activations_are_quantized_once() -> None:
    with pytest.raises(StepError, match="quantized already"):
        compress(rings(), [Static(), Aware()])


@pytest.mark.parametrize(
    "options", [{"weight_bits": 1}, {"activation_bits": 9}, {"ranges": "learned"}, {"samples": 0}, {"epochs": 0}], ids=str
)
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(StepError):
        Aware(**options)


def test_two_bits_of_a_weight_are_four_values_without_a_zero() -> None:
    graph = compress(rings(), Aware(weight_bits=2, activation_bits=2, edges=4, epochs=2.0)).graph
    _, tensors = to_data(graph)
    assert tensors["3.weight"].unique().tolist() == [-3, -1, 1, 3]


def test_biases_keep_their_precision_in_engines(tmp_path: Path) -> None:
    """ONNX Runtime rounds them to multiples of both scales, which at two bits would be as coarse as the activations."""
    torch.manual_seed(0)
    x = torch.randn(256, 2, 8, 8)
    layers = [part for width in (2, 8, 8) for part in (nn.Conv2d(width, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    batches = [(part, torch.zeros(32, dtype=torch.long)) for part in x.split(32)]
    for norm in model[1::3][:3]:
        norm.bias.data = torch.randn(8)
    task = Task(model.eval(), x[:2], train=batches, calibration=batches, loss=F.cross_entropy)
    graph = compress(task, Aware(weight_bits=2, activation_bits=2, epochs=0.2)).graph
    session = multum.Session(multum.export(graph, tmp_path / "made.onnx"), engine="onnxruntime")
    with torch.no_grad():
        wrong = session.predict(x) - graph(x)
        assert float(wrong.norm() / graph(x).norm()) < 0.02


def test_zeros_of_pruned_weights_stay_at_two_bits() -> None:
    graph = compress(rings(), [Weights(ratio=0.5, criterion="random", recover=False), Aware(weight_bits=2, edges=4, epochs=2.0)]).graph
    _, tensors = to_data(graph)
    assert tensors["3.weight"].unique().tolist() == [-1, 0, 1]
    assert float((graph.tensor("3.weight") == 0).float().mean()) > 0.45


def test_integers_and_scales_by_hand() -> None:
    x = torch.tensor([[0.5, -1.5, 4.0, -2.5], [0.0, 0.1, 0.1, 0.2]])
    assert odd_integers(x, torch.tensor([1.0, 0.1]), 1, 0).tolist() == [[1, -1, 1, -1], [1, 1, 1, 1]]
    assert odd_integers(x, torch.tensor([1.0, 0.1]), 2, 0).tolist() == [[1, -1, 3, -3], [1, 1, 1, 3]]
    torch.testing.assert_close(fitted(x, torch.tensor([1.0, 0.1]), 1, 0), x.abs().mean(1))  # XNOR-Net, equation 6
    torch.testing.assert_close(fitted(x, torch.tensor([1.0, 0.1]), 2, 0), torch.tensor([(0.5 + 1.5 + 12 + 7.5) / 20, 0.8 / 12]))


def test_gradients_pass_straight_through_inside_the_range_alone() -> None:
    task = rings()
    graph = task.original.copy().requires_grad_(True)
    (layer,) = [layer for layer in layers(graph) if layer.name == "3"]
    graph.set_tensor("3.weight", torch.linspace(-1, 1, 24).repeat(24, 1))
    midrise = Midrise([layer], 1)
    midrise.quantize(graph)
    (quantizer,) = graph.find(aten.fake_quantize_per_channel_affine.default)
    args = [graph.tensor(str(node.target)) for node in quantizer.all_input_nodes]
    rounded = quantizer.target(*args, *quantizer.args[3:])
    scale = args[0].detach().abs().mean(1, keepdim=True)
    torch.testing.assert_close(rounded, scale * torch.where(args[0] >= 0, 1.0, -1.0))
    rounded.sum().backward()  # by hand: with a mean magnitude of a, between -2a and 2a
    assert torch.equal(args[0].grad, (args[0].detach().abs() <= 2 * scale).float())


def test_training_finds_signs_that_do_and_they_are_stored_as_such() -> None:
    task = rings()
    start = compress(task, Binary(epochs=1e-9, learning_rate=1e-12)).graph
    result = compress(task, Binary(epochs=20.0, learning_rate=1e-2))
    assert error(result.graph, task) < 0.5 * error(start, task)
    data, tensors = to_data(result.graph)
    assert tensors["3.weight"].unique().tolist() == [-1, 1]
    assert min(int(tensors[f"{name}.weight"].abs().max()) for name in (0, 6)) > 100
    x = torch.randn(8, 2)
    with torch.no_grad():
        assert torch.equal(from_data(data, tensors)(x), result.graph(x))
    assert not result.graph.find(aten.batch_norm.default)


def test_activations_can_follow() -> None:
    for after in (Static(), Aware(activation_bits=4, edges=4, epochs=1.0)):
        graph = compress(rings(), [Binary(), after]).graph
        assert to_data(graph)[1]["3.weight"].unique().tolist() == [-1, 1]


def test_zeros_that_must_stay_have_no_sign() -> None:
    pruned = Weights(ratio=0.5, criterion="random", recover=False, include="3")
    (_, record) = compress(rings(), [pruned, Binary()]).records
    assert record.skipped == {"3": "its zeros must stay, and a sign has none"}


def test_binary_weights_are_refused_twice() -> None:
    with pytest.raises(StepError, match="quantized already"):
        compress(rings(), [Binary(), Binary()])


@pytest.mark.parametrize("options", [{"edges": 1}, {"epochs": 0}], ids=str)
def test_options_of_binary_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(StepError):
        Binary(**options)


@pytest.mark.parametrize(
    "steps", [[Aware(weight_bits=2, activation_bits=2, edges=2, epochs=8.0, learning_rate=1e-2)], [Static(4, 3, edges=4)]]
)
def test_few_bits_are_exported_bit_for_bit(steps: list[multum.Step]) -> None:
    """Engines round biases to multiples of both scales: those of the graph are multiples already."""
    torch.manual_seed(0)
    body = [
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 2),
    ]
    x = torch.randn(64, 1, 8, 8)
    y = (x.mean((1, 2, 3)) > 0).long()
    model = nn.Sequential(*body)
    for _ in range(3):  # the statistics of the normalizations
        model(x + 0.3)
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]
    task = Task(model.eval(), x[:2], train=batches, calibration=batches, loss=F.cross_entropy)
    graph = compress(task, steps).graph
    found = verify(graph, to_onnx_bytes(graph), [x + 0.1 * torch.randn_like(x) for _ in range(4)])
    assert found.largest_difference < 1e-4


@pytest.mark.parametrize("step", [Aware, Binary, Gradual, Shrink, Reparameterize])
def test_any_training_may_go_far(step: type[multum.Step]) -> None:
    task = rings()
    assert step(optimizer="sgd").optimizer == "sgd"  # type: ignore[call-arg, attr-defined]
    with pytest.raises(MultumError, match="'adamw' or 'sgd'"):
        step(optimizer="adam")  # type: ignore[call-arg]
    if step is Aware:
        far = compress(task, Aware(optimizer="sgd", learning_rate=0.1, epochs=2.0)).graph
        assert error(far, task) != error(compress(task, Aware(learning_rate=0.1, epochs=2.0)).graph, task)
