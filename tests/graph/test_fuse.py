"""Fusions change the operators and not the function."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from multum.graph import Graph, capture, layers
from multum.graph.fuse import fuse
from multum.graph.model import aten
from multum.task import call, tensors
from multum.testing import CONFIGS, CORE, ZOO

FASHION = Path(__file__).parents[2] / "examples" / "fashion_mnist"


def settle(model: nn.Module) -> nn.Module:
    """Gives batch norms statistics and affine parts unlike the initial ones."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias)
    return model.eval()


def difference(graph: Graph, model: nn.Module, inputs: object) -> float:
    """The relative error of the graph's outputs."""
    with torch.no_grad():
        pairs = zip(tensors(call(graph, inputs)), tensors(call(model, inputs)), strict=True)
        return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def norms(graph: Graph) -> int:
    return len(graph.find(aten.batch_norm.default))


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), torch.randn(2, 3, 9)),
        (nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6, affine=False)), torch.randn(2, 4, 5, 5)),
        (nn.Sequential(nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4)), torch.randn(2, 2, 4, 4, 4)),
        (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6)), torch.randn(2, 4, 5, 5)),
        (nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)), torch.randn(3, 5)),
    ],
    ids=["conv1d", "grouped without affine", "conv3d", "transposed and grouped", "linear"],
)
def test_a_batch_norm_goes_into_the_layer_before_it(model: nn.Module, inputs: Tensor) -> None:
    graph = capture(settle(model), inputs)
    assert fuse(graph) == ["1 folded into 0"]
    assert norms(graph) == 0
    assert difference(graph, model, inputs) <= 1e-5
    assert {name for name, _ in graph.named_tensors()} == {"0.weight", "0.bias"}


def test_folding_by_hand() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1, eps=0.0))
    with torch.no_grad():
        model[0].weight.fill_(3), model[0].bias.fill_(1)
        model[1].running_mean.fill_(2), model[1].running_var.fill_(4)
        model[1].weight.fill_(10), model[1].bias.fill_(7)
    graph = capture(model.eval(), torch.zeros(2, 1))
    fuse(graph)
    assert graph.tensor("0.weight").item() == 15  # 3 * 10 / sqrt(4)
    assert graph.tensor("0.bias").item() == 2  # (1 - 2) * 10 / 2 + 7


class ReadTwice(nn.Module):
    """The convolution's result goes past the norm as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class SharedWeight(ReadTwice):
    """Two convolutions with one weight; a norm behind one of them."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + torch.relu(self.conv(x))


class LaterBias(nn.Module):
    """The module's own bias is added behind the norm, under the name that a bias of the convolution would get."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(2, 2, 1, 1)), nn.Parameter(torch.randn(2, 1, 1))
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(nn.functional.conv2d(x, self.weight)) + self.bias


@pytest.mark.parametrize(
    "model",
    [ReadTwice(), SharedWeight(), nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False))],
    ids=["read twice", "shared weight", "no running statistics"],
)
def test_a_norm_stays_where_folding_would_change_the_function(model: nn.Module) -> None:
    inputs = torch.randn(4, 2, 3, 3)
    graph = capture(settle(model), inputs)
    fuse(graph)
    assert norms(graph) == 1
    assert difference(graph, model, inputs) <= 1e-6


def test_a_linear_layer_over_tokens_keeps_its_norm() -> None:
    model = settle(nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(5)))  # the norm counts dimension 1, the layer the last
    inputs = torch.randn(2, 5, 3)
    graph = capture(model, inputs)
    assert fuse(graph) == []
    assert norms(graph) == 1


def test_a_new_bias_takes_no_other_tensor_s_name() -> None:
    model, inputs = settle(LaterBias()), torch.randn(2, 2, 3, 3)
    graph = capture(model, inputs)
    fuse(graph)
    assert norms(graph) == 0
    assert torch.equal(graph.tensor("bias"), model.bias)
    assert difference(graph, model, inputs) <= 1e-5


def test_identities_go_and_constants_become_tensors() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(6.0).reshape(1, 6))

        def forward(self, x: Tensor) -> Tensor:
            y = nn.functional.dropout(x, 0.3, self.training).contiguous().clone().to(torch.float32)
            return y * self.table[:, :3].exp() + torch.arange(3)

    model, inputs = Model().eval(), torch.randn(2, 3)
    graph = capture(model, inputs)
    fuse(graph)
    assert [str(node.target) for node in graph.fx.nodes if node.op == "call_function"] == ["aten.mul.Tensor", "aten.add.Tensor"]
    assert difference(graph, model, inputs) == 0
    assert fuse(graph) == []


def test_random_numbers_and_parameters_are_no_constants() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale.exp() + torch.rand(3)

    graph = capture(Model(), torch.zeros(2, 3))
    assert fuse(graph) == []
    with torch.no_grad():
        assert not torch.equal(graph(torch.zeros(2, 3)), graph(torch.zeros(2, 3)))
    assert {name for name, _ in graph.named_tensors()} == {"scale"}


def test_dropout_that_always_trains_stays() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x, 0.5, True)

    graph = capture(Model(), torch.ones(2, 3))
    assert fuse(graph) == []


@pytest.mark.parametrize("pads", [(1, 1, 1, 1), (2, 2, 0, 0)])
def test_even_padding_goes_into_the_convolution(pads: tuple[int, ...]) -> None:
    model, inputs = nn.Sequential(nn.ZeroPad2d(pads), nn.Conv2d(2, 3, 3, padding=1)), torch.randn(2, 2, 6, 6)
    graph = capture(model, inputs)
    assert len(fuse(graph)) == 1
    (layer,) = layers(graph)
    assert list(layer.node.args[4]) == [pads[2] + 1, pads[0] + 1]
    assert difference(graph, model, inputs) <= 1e-6


@pytest.mark.parametrize("pad", [nn.ZeroPad2d((0, 1, 0, 1)), nn.ConstantPad2d(1, 0.5), nn.ReflectionPad2d(1)])
def test_other_padding_stays(pad: nn.Module) -> None:
    graph = capture(nn.Sequential(pad, nn.Conv2d(2, 3, 3)), torch.randn(2, 2, 6, 6))
    assert fuse(graph) == []


@pytest.mark.parametrize("name", [name if name in CORE else pytest.param(name, marks=pytest.mark.slow) for name in ZOO])
def test_every_kind_of_model_computes_the_same(name: str) -> None:
    if name in CONFIGS:
        pytest.importorskip("transformers")
    model, example = ZOO[name]()
    graph = capture(settle(model), example)
    fuse(graph)
    assert difference(graph, model, example) <= 1e-5
    graph.refresh()


def test_the_trained_resnet_computes_the_same_with_no_norm_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FASHION))
    from model import ResNet20

    model = ResNet20().eval()
    model.load_state_dict(load_file(FASHION / "resnet20.safetensors"))
    inputs = torch.randn(8, 1, 28, 28)
    graph = capture(model, inputs)
    assert len(fuse(graph)) == 21
    assert norms(graph) == 0
    assert difference(graph, model, inputs) <= 1e-5
