"""A captured graph computes what the model computes, under the model's own names; what cannot be captured says why."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from multum import capture
from multum.errors import CaptureError, GraphError
from multum.graph import layers
from multum.graph.file import from_data, to_data
from multum.graph.model import aten
from multum.testing import CONFIGS, CORE, ZOO

MODELS = [name if name in CORE else pytest.param(name, marks=pytest.mark.slow) for name in ZOO]


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if hasattr(value, "values") else value
    return [leaf for part in parts for leaf in flat(part)]


def run(model, example):
    if isinstance(example, dict):
        return flat(model(**example))
    return flat(model(*example)) if isinstance(example, tuple) else flat(model(example))


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


@pytest.mark.parametrize("name", MODELS)
def test_eval_equals_the_model(name):
    if name in CONFIGS:
        pytest.importorskip("transformers")
    model, example = ZOO[name]()
    graph = capture(model, example)
    assert not graph.training
    with torch.no_grad():
        for expected, found in zip(run(model, example), run(graph, example), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal])
def test_weights_that_are_computed_from_tensors_are_computed_once(norm):
    shared = norm(nn.Linear(6, 6))
    model = nn.Sequential(nn.Linear(4, 6), shared, nn.ReLU(), shared, nn.Conv1d(1, 2, 3)).eval()
    model.forward = lambda x: model[4](model[3](model[2](model[1](model[0](x))))[:, None])
    graph = capture(model, torch.randn(2, 4))
    assert [layer.weight for layer in layers(graph)] == ["0.weight", "1.weight", "1.weight", "4.weight"]
    assert {name for name, _ in graph.named_tensors()} == {f"{place}.{kind}" for place in (0, 1, 4) for kind in ("weight", "bias")}
    assert graph.tensor("1.weight").requires_grad
    x = torch.randn(3, 4)
    torch.testing.assert_close(graph(x), model(x))


def test_a_weight_that_is_computed_from_data_stays_computed():
    model = Lambda(lambda m, x: nn.functional.linear(x, (x * m.scale).sum(0, keepdim=True)))
    assert [name for name, _ in capture(model, torch.randn(2, 3)).named_tensors()] == ["scale"]


class Computed(nn.Module):
    def __init__(self, compute):
        super().__init__()
        self.encode, self.bias, self.compute = nn.Linear(4, 3), nn.Parameter(torch.randn(4)), compute

    def forward(self, x):
        return nn.functional.linear(self.encode(x), self.compute(self.encode.weight), self.bias)


@pytest.mark.parametrize(
    "compute",
    [
        lambda w: 2 * w.t(),  # the decoder of a tied autoencoder
        lambda w: torch.rand(4, 3) * w.t(),
    ],
)
def test_a_weight_that_shares_a_parameter_or_is_random_stays_computed(compute):
    graph = capture(Computed(compute), torch.randn(2, 4))
    assert {name for name, _ in graph.named_tensors()} == {"encode.weight", "encode.bias", "bias"}


def test_a_weight_with_noise_stays_noisy():
    noisy = Lambda(lambda m, x: nn.functional.linear(x, m.scale + torch.randn(3, 3)))
    graph = capture(noisy, torch.randn(2, 3))
    x = torch.randn(2, 3)
    assert not torch.equal(graph(x), graph(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell, functools.partial(nn.RNNCell, nonlinearity="relu")])
def test_cells_are_written_out_as_linear_layers(cell, bias):
    model = cell(3, 4, bias=bias)
    state = (torch.randn(2, 4), torch.randn(2, 4)) if isinstance(model, nn.LSTMCell) else torch.randn(2, 4)
    graph = capture(model, (torch.randn(2, 3), state))
    assert [layer.kind for layer in layers(graph)] == ["linear", "linear"]
    x = torch.randn(2, 3)
    torch.testing.assert_close(graph(x, state), model(x, state))


def test_training_equals_the_model_with_gradients_and_running_statistics():
    model, example = ZOO["resnet"]()
    graph = capture(model, example)
    model.train(), graph.train()
    for _ in range(2):
        for network in (model, graph):
            network(example).square().sum().backward()
    parameters = dict(graph.tensors.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameters[name].grad, parameter.grad, rtol=1e-4, atol=1e-5)
    buffers = dict(graph.tensors.named_buffers())
    for name, buffer in model.named_buffers():
        if "num_batches" not in name:
            torch.testing.assert_close(buffers[name], buffer, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(graph.eval()(example), model.eval()(example), rtol=1e-5, atol=1e-5)


def test_drop_out_works_only_in_training():
    graph = capture(nn.Sequential(nn.Linear(4, 200), nn.Dropout(0.5)), torch.randn(2, 4))
    x = torch.randn(2, 4)
    assert torch.equal(graph(x), graph(x))
    graph.train()
    assert 0.3 < (graph(x) == 0).float().mean() < 0.7


def test_the_model_is_not_changed():
    model, example = ZOO["resnet"]()
    model.train()
    model[0].eval()
    before = copy.deepcopy(model.state_dict())
    graph = capture(model, example)
    assert [m.training for m in model[:3]] == [False, True, True]
    graph.train()(example)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_names_are_the_models_own():
    model, example = ZOO["resnet"]()
    graph = capture(model, example)
    own = {name: value for name, value in model.state_dict().items() if "num_batches" not in name}
    assert {name: tuple(value.shape) for name, value in graph.named_tensors()} == {name: tuple(v.shape) for name, v in own.items()}
    assert [layer.name for layer in layers(graph) if layer.kind == "conv"][:3] == ["0.0", "1.conv1.0", "1.conv2"]


def test_tied_weights_are_one_tensor():
    model, example = ZOO["tied_weights"]()
    graph = capture(model, example)
    names = [name for name, _ in graph.named_tensors()]
    assert len(names) == 3
    assert len({layer.weight for layer in layers(graph) if layer.kind in ("embedding", "linear")}) == 2
    with torch.no_grad():
        graph.tensor(names[0]).zero_()
    assert sum(tensor.numel() for _, tensor in graph.named_tensors()) == sum(p.numel() for p in model.parameters())


def test_frozen_parameters_stay_frozen():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    graph = capture(model, torch.randn(2, 3))
    assert [p.requires_grad for _, p in graph.tensors.named_parameters()] == [False, False, True, True]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.clone().relu_().mul_(m.scale).add_(1),
        lambda m, x: nn.functional.relu(x * m.scale, inplace=True),
        lambda m, x: (x * m.scale).clamp_(-1, 1).unsqueeze_(1),
        lambda m, x: torch.zeros_like(x).copy_(x) * m.scale,
    ],
)
def test_in_place_operators_become_plain(function):
    model, x = Lambda(function), torch.randn(3, 4)
    graph = capture(model, x.clone())
    assert not any(node.target._schema.is_mutable for node in graph.fx.nodes if isinstance(node.target, torch._ops.OpOverload))
    torch.testing.assert_close(graph(x.clone()), model(x.clone()))


def test_an_in_place_change_is_seen_by_later_readers_of_the_tensor():
    def function(m, x):
        y = x * m.scale
        z = y.relu_()
        return y + z

    x = torch.randn(3, 4)
    graph = capture(Lambda(function), x)
    torch.testing.assert_close(graph(x), 2 * (2 * x).relu())


def zero_column(m, x):
    y = x * m.scale
    y[:, 0].zero_()
    return y


def assign_block(m, x):
    y = x * m.scale
    z = y + 1
    y[:, 1:3] = x[:, :2]
    return y + z


def assign_to_input(m, x):
    x[:, 0] = 3.0
    return x * m.scale


@pytest.mark.parametrize("function", [zero_column, assign_block, assign_to_input])
def test_assignments_to_slices_are_kept(function):
    model, x = Lambda(function), torch.randn(3, 4)
    torch.testing.assert_close(capture(model, x.clone())(x.clone()), model(x.clone()))


def through_a_transpose(m, x):
    y = x * m.scale
    y.transpose(0, 1).relu_()
    return y


def seen_by_an_older_view(m, x):
    y = x * m.scale
    column = y[:, 1]
    y[:, 1:3] = 7.0
    return column


def seen_by_a_view_of_the_whole(m, x):
    y = x * m.scale
    column = y[:, 1]
    y.relu_()
    return column


@pytest.mark.parametrize("function", [through_a_transpose, seen_by_an_older_view, seen_by_a_view_of_the_whole])
def test_other_changes_through_views_are_refused(function):
    with pytest.raises(CaptureError, match="through a view") as caught:
        capture(Lambda(function), torch.randn(3, 4))
    assert "torch.where" in caught.value.do


def test_blocks_under_no_grad_and_autocast_are_inlined():
    def function(m, x):
        with torch.no_grad():
            y = x * m.scale
        with torch.autocast("cpu", enabled=False):
            return y @ y.transpose(0, 1)[:, :1]

    x = torch.randn(3, 4)
    graph = capture(Lambda(function), x)
    assert not any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in graph.fx.nodes)
    torch.testing.assert_close(graph(x), (2 * x) @ (2 * x).T[:, :1])


@pytest.mark.parametrize("size", [1, 3, 7])
def test_an_example_of_one_sample_leaves_the_batch_free(size):
    model, _ = ZOO["resnet"]()
    graph = capture(model, torch.randn(1, 3, 16, 16))
    x = torch.randn(size, 3, 16, 16)
    torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)


def test_nested_inputs_and_outputs_keep_their_structure():
    model, example = ZOO["keyword_inputs"]()
    graph = capture(model, example)
    joined, sides = graph(**example)
    assert joined.shape == (2, 5)
    assert set(sides) == {"left", "right"}
    with pytest.raises(GraphError, match=r"keys \['pair'\]"):
        graph(pair=example["pair"])


def test_constants_of_the_example_are_fixed():
    graph = capture(Lambda(lambda m, x, double: x * m.scale * (2 if double else 1)), {"x": torch.ones(2, 3), "double": True})
    assert float(graph(x=torch.ones(1, 3), double=True).detach()[0, 0]) == 4
    with pytest.raises(GraphError, match="False"):
        graph(x=torch.ones(1, 3), double=False)


def test_batch_norm_without_statistics_trains_always():
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3))
    x = torch.randn(4, 1, 5, 5)
    graph = capture(model.eval(), x)
    torch.testing.assert_close(graph.train().eval()(x), model(x))
    assert [node.args[5] for node in graph.find(aten.batch_norm.default)] == [True, False]


def test_capture_of_a_graph_is_a_copy():
    graph = capture(nn.Linear(2, 2), torch.randn(2, 2))
    again = capture(graph, torch.randn(2, 2))
    assert again is not graph
    assert again.fingerprint() == graph.fingerprint()


def test_a_branch_on_data_names_the_parts_that_can_be_captured():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            x = self.stem(x)
            return self.head(x if bool((x > 0).any()) else -x)

    with pytest.raises(CaptureError) as caught:
        capture(Branching(), torch.randn(2, 3))
    assert "Branching cannot be captured whole" in caught.value.given
    assert caught.value.do.endswith("these can be captured: stem, head")


def branch(m, x):
    return x * m.scale if bool((x.sum() > 0).item()) else x


def loop(m, x):
    while x.abs().max() > 1e-3:
        x = x * m.scale / 4
    return x


def rows_by_data(m, x):
    return (x * m.scale)[x.sum(1) > 0]


def conditional(m, x):
    return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x * m.scale,))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (branch, r"asks for a value that depends on data, at .*test_capture.py:\d+: return x \* m.scale if bool"),
        (loop, r"asks for a value that depends on data, at .*test_capture.py:\d+: while x.abs"),
        (rows_by_data, r"the size of what aten.index.Tensor gives depends on data, at .*test_capture.py:\d+: "),
        (conditional, r"the control-flow operator cond chooses by data what runs"),
    ],
)
def test_control_flow_that_depends_on_data_names_the_line(function, message, capfd):
    with pytest.raises(CaptureError, match=message):
        capture(Lambda(function), torch.randn(3, 4))
    assert "def forward" not in "".join(capfd.readouterr())


def test_modules_may_have_names_that_python_cannot_spell():
    names = ("class", "class_", "b-1", "1x")
    model = nn.ModuleDict({name: nn.Linear(3, 3) for name in names})
    model.forward = lambda x: functools.reduce(lambda y, name: model[name](y), names, x)
    x = torch.randn(2, 3)
    graph = capture(model, x)
    assert [name for name, _ in graph.named_tensors()][::2] == ["class_.weight", "class_.weight_", "b_1.weight", "_1x.weight"]
    torch.testing.assert_close(graph(x), model(x))
    assert from_data(*to_data(graph)).fingerprint() == graph.fingerprint()


def test_the_axis_of_a_layer_is_the_dimension_of_its_outputs():
    found = {layer.name: layer for layer in layers(capture(*ZOO["tied_weights"]()))}
    assert [(layer.axis, layer.scale_axis) for layer in found.values()] == [(1, 0), (0, 0), (0, 0)]
    for name in ("unet", "gpt2"):
        for layer in layers(graph := capture(*ZOO[name]())):
            if layer.kind != "norm":
                dim = 1 if layer.kind == "conv" else -1
                assert graph.tensor(layer.weight).shape[layer.axis] == layer.node.meta["val"].shape[dim]


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (lambda x: x, torch.ones(2), "The model is a function"),
        (nn.Linear(2, 2), (), "The example holds no tensor"),
        (nn.Linear(2, 2), object(), "is a object"),
        (nn.Linear(3, 2), torch.ones(2, 4), "Linear cannot be captured whole: RuntimeError: .*mat1 and mat2|a and b must"),
    ],
)
def test_wrong_models_and_examples(model, example, message):
    with pytest.raises((CaptureError, GraphError), match=message):
        capture(model, example)


def test_weights_that_are_not_finite_are_named():
    model = nn.Sequential(nn.Linear(2, 2))
    with torch.no_grad():
        model[0].bias[1] = float("nan")
    with pytest.raises(CaptureError, match=r"'0\.bias'.*NaN"):
        capture(model, torch.ones(2, 2))


def test_outputs_of_an_unknown_kind_are_named():
    with pytest.raises((CaptureError, GraphError), match=r"output.* is a object"):
        capture(Lambda(lambda m, x: {"a": x * m.scale, "b": object()}), torch.ones(2, 2))
