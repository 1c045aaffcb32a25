"""The training loop: it learns, counts, keeps the best, stops in time, and changes nothing that it must not."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from multum.errors import TrainError
from multum.graph import Graph, capture
from multum.graph.model import aten
from multum.task import Task
from multum.train import Training, arrange, fit, lay_out
from multum.train.optimizer import optimizer as of_parameters

torch.set_num_threads(1)


def mse(inputs: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.mse_loss(outputs, targets)


def regression(batches: int = 10) -> list[tuple[Tensor, Tensor]]:
    """Noiseless data of y = x W with a fixed W [4, 3]."""
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(4, 3, generator=draw)
    return [(x, x @ weight) for x in torch.randn(batches, 16, 4, generator=draw)]


def task_of(model: nn.Module, data: object, **parts: object) -> Task:
    return Task(model, next(iter(data))[0], train=data, **parts)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def images(batches: int = 4) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(2)
    return [(torch.randn(8, 3, 6, 6, generator=draw), torch.randint(0, 4, (8,), generator=draw)) for _ in range(batches)]


def entropy(inputs: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_linear_layer_learns_a_linear_map(optimizer: str) -> None:
    task = task_of(nn.Linear(4, 3), regression())
    graph = task.original.copy().requires_grad_(True)
    history = fit(graph, task, mse, Training(epochs=40, learning_rate=0.05, optimizer=optimizer, weight_decay=0))
    assert history["steps"] == 400
    assert history["loss_last"] < 1e-3 < 0.1 < history["loss_first"]
    x, y = task.train[0]
    assert torch.allclose(graph(x), y, atol=0.1)
    assert not graph.training


class Unsized:
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from regression(7)


@pytest.mark.parametrize(
    ("data", "epochs", "steps"), [(regression(10), 0.5, 5), (regression(10), 2.3, 23), (Unsized(), 2, 14), (regression(3), 0.01, 1)]
)
def test_epochs_may_be_a_fraction_and_data_need_no_length(data: object, epochs: float, steps: int) -> None:
    task = task_of(nn.Linear(4, 3), data)
    calls = []

    def loss(inputs: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        return mse(inputs, outputs, targets)

    assert fit(task.original.copy().requires_grad_(True), task, loss, Training(epochs=epochs))["steps"] == steps
    assert len(calls) == steps


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    how = Training(learning_rate=1.0, warmup=0.2)
    assert [how.rate(step, 10) for step in (0, 1)] == pytest.approx([1 / 3, 2 / 3])
    assert how.rate(2, 10) == 1.0
    assert how.rate(6, 10) == pytest.approx(0.5)  # half way down the cosine
    assert how.rate(10, 10) == 0.0
    assert Training(learning_rate=1.0, warmup=0).rate(0, 1) == 1.0


@pytest.mark.parametrize("wrong", [{"optimizer": "adam"}, {"epochs": 0}, {"learning_rate": math.inf}, {"warmup": 1.5}, {"clip": -1}])
def test_wrong_options_are_refused_by_name(wrong: dict) -> None:
    ((_name, value),) = wrong.items()
    with pytest.raises(TrainError, match=repr(value).replace(".", r"\.")):
        Training(**wrong)


def test_the_original_keeps_its_bits_and_the_graph_its_shape() -> None:
    task = task_of(Net(), images())
    before = task.original.fingerprint()
    graph = task.original.copy().requires_grad_(True)
    state = torch.get_rng_state()
    fit(graph, task, entropy, Training(epochs=1))
    assert task.original.fingerprint() == before
    assert graph.fingerprint() != before
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers go on as if nothing had happened
    assert graph.tensor("conv.weight").is_contiguous()
    assert all(parameter.grad is None for parameter in graph.parameters())
    assert graph.code == task.original.code
    assert not {"forward", "_original_forward"} & set(vars(graph))


def test_only_weights_that_multiply_decay() -> None:
    class Positioned(Net):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.ones(1, 8, 6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.norm(self.conv(x)) + self.position).mean((2, 3)))

    task = task_of(Positioned(), images())
    graph = task.original.copy().requires_grad_(True)
    before = {name: parameter.detach().clone() for name, parameter in graph.tensors.named_parameters()}
    fit(graph, task, lambda inputs, outputs, targets: 0 * outputs.sum(), Training(weight_decay=0.5, learning_rate=0.1, warmup=0))
    changed = {name for name, parameter in graph.tensors.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"conv.weight", "head.weight"}
    assert (graph.tensor("head.weight").abs() <= before["head.weight"].abs()).all()


@pytest.mark.parametrize("at", [1, 7, 19])
def test_a_loss_that_is_not_finite_stops_training_and_leaves_the_last_good_state(at: int) -> None:
    task = task_of(nn.Linear(4, 3), regression(20))
    graph = task.original.copy().requires_grad_(True)
    steps = []

    def loss(inputs: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        steps.append(1)
        return mse(inputs, outputs, targets) * (math.nan if len(steps) == at else 1.0)

    with pytest.raises(TrainError, match=f"The loss is nan at step {at} of 20") as caught:
        fit(graph, task, loss)
    assert "learning rate" in caught.value.do
    assert graph.fingerprint() == task.original.fingerprint()


def test_weights_broken_by_the_last_step_are_noticed() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return gradient * math.nan

    task = task_of(nn.Linear(4, 3), regression(1))
    with pytest.raises(TrainError, match="'weight' is not finite after training"):
        fit(task.original.copy().requires_grad_(True), task, lambda i, o, t: Broken.apply(o).sum(), Training(clip=0))


def scored(scores: list[float], graph: Graph, states: list[str]):
    """A metric that gives what is written in `scores`, one after the other, and notes the state it was asked for."""
    left = iter(scores)

    def metric(predict: object, data: object) -> float:
        states.append(graph.fingerprint())
        return next(left)

    return metric


@pytest.mark.parametrize(("higher", "scores", "best"), [(True, [9, 1, 3, 2], 2), (False, [0, 3, 1, 2], 2), (True, [0, 2, 2, 2], 1)])
def test_the_best_state_after_a_pass_is_kept(higher: bool, scores: list[float], best: int) -> None:
    data = regression(5)
    model = nn.Linear(4, 3)
    graph = capture(model, data[0][0])
    states: list[str] = []
    task = task_of(model, data, validation=data, metric=scored(scores, graph, states), higher_is_better=higher)
    history = fit(graph, task, mse, Training(epochs=3))
    assert history["validation"] == [(step, score) for step, score in zip((0, 5, 10, 15), scores, strict=True)]
    assert history["kept"] == 5 * best
    assert graph.fingerprint() == states[best]
    assert len(set(states)) == 4


def test_training_stops_when_validation_no_longer_gains() -> None:
    data = regression(5)
    graph = capture(nn.Linear(4, 3), data[0][0])
    states: list[str] = []
    task = task_of(nn.Linear(4, 3), data, validation=data, metric=scored([0, 1, 5, 4, 3, 2, 1], graph, states))
    history = fit(graph, task, mse, Training(epochs=6, patience=2))
    assert [score for _, score in history["validation"]] == [0, 1, 5, 4, 3]
    assert (history["steps"], history["kept"]) == (20, 10)
    assert graph.fingerprint() == states[2]


def test_learned_scales_stay_positive() -> None:
    data = regression(5)
    graph = capture(nn.Linear(4, 3), data[0][0])
    node = graph.find(aten.linear.default)[0]
    graph.set_tensor("weight_scale", torch.tensor([0.01]), parameter=True)
    graph.set_tensor("weight_zero", torch.tensor([0.0]))
    scale, zero = graph.attribute("weight_scale", node), graph.attribute("weight_zero", node)
    with graph.fx.inserting_before(node):
        quantizer = aten._fake_quantize_learnable_per_tensor_affine.default
        quantized = graph.fx.call_function(quantizer, (node.args[1], scale, zero, -8, 7, 1.0))
    node.update_arg(1, quantized)
    graph.recompile()
    seen = []

    def loss(inputs: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(graph.tensor("weight_scale").item())
        return mse(inputs, outputs, targets) + 100 * graph.tensor("weight_scale").sum()

    fit(graph, task_of(nn.Linear(4, 3), data), loss, Training(learning_rate=0.1, epochs=2, optimizer="sgd"))
    assert seen[-1] < 0.01
    assert min(*seen, graph.tensor("weight_scale").item()) > 0


def test_the_tasks_own_fit_replaces_the_loop() -> None:
    data = regression(5)

    def own(graph: Graph, loss: object) -> None:
        assert graph.training
        optimizer = torch.optim.SGD(graph.parameters(), 0.1)
        for x, y in data:
            loss(x, graph(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    task = task_of(nn.Linear(4, 3), data, fit=own)
    graph = task.original.copy().requires_grad_(True)
    history = fit(graph, task, mse)
    assert history["steps"] == 5
    assert history["loss_last"] < history["loss_first"]
    assert not graph.training


USELESS = [
    (lambda inputs, outputs, targets: outputs, r"a tensor \[16, 3\]"),
    (lambda inputs, outputs, targets: 1.0, "a float"),
    (lambda inputs, outputs, targets: outputs.detach().sum(), r"a tensor \[\]"),
]


@pytest.mark.parametrize(("loss", "message"), USELESS)
def test_a_loss_that_cannot_be_minimized_is_refused(loss: object, message: str) -> None:
    task = task_of(nn.Linear(4, 3), regression())
    with pytest.raises(TrainError, match=message):
        fit(task.original.copy().requires_grad_(True), task, loss)


def test_a_frozen_graph_is_refused() -> None:
    task = task_of(nn.Linear(4, 3), regression())
    with pytest.raises(TrainError, match="no parameter that can be trained"):
        fit(task.original.copy(), task, mse)


class Viewing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).view(x.shape[0], -1))


def test_convolutions_run_channels_last_unless_their_result_is_viewed() -> None:
    example = torch.randn(2, 3, 6, 6)
    graph, viewing, linear = capture(Net(), example), capture(Viewing(), example), capture(nn.Linear(4, 3), torch.randn(2, 4))
    assert lay_out(graph) is torch.channels_last
    assert graph.tensor("conv.weight").is_contiguous(memory_format=torch.channels_last)
    assert lay_out(viewing) is lay_out(linear) is torch.contiguous_format
    assert viewing.tensor("conv.weight").is_contiguous()


def test_nested_inputs_are_arranged() -> None:
    value = {"a": (torch.randn(2, 3, 4, 5), None), "b": [torch.randn(2, 3), 7]}
    arranged = arrange(value, torch.device("cpu"), torch.channels_last)
    assert arranged["a"][0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(arranged["a"][0], value["a"][0])
    assert arranged["a"][1] is None
    assert isinstance(arranged["a"], tuple)
    assert arranged["b"][1] == 7


def test_sgd_decays_weights_less_than_adamw_does_since_its_decay_is_a_gradient() -> None:
    graph = capture(nn.Linear(2, 1), torch.zeros(2, 2)).requires_grad_(True)
    for name, decay in (("adamw", 0.01), ("sgd", 5e-4)):
        rows = of_parameters(graph, Training(optimizer=name), torch.device("cpu")).param_groups
        assert [row["weight_decay"] for row in rows] == [0.0, decay]
    assert (Training().clip, Training(optimizer="sgd").clip, Training(optimizer="sgd", clip=0.0).clip) == (1.0, 5.0, 0.0)
    given = of_parameters(graph, Training(optimizer="sgd", weight_decay=0.0), torch.device("cpu"))
    assert [row["weight_decay"] for row in given.param_groups] == [0.0, 0.0]
