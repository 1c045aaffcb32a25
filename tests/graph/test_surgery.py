"""Cutting: what the result computes beside modules with zeroed weights, what stays of parameters, and what is refused."""

import pytest
import torch
from torch import Tensor, nn

from multum import capture
from multum.errors import GraphError
from multum.graph.axes import axes
from multum.graph.surgery import cut
from multum.testing import ZOO

from .exact import double, lively, masked


def test_against_the_original_module_with_its_weights_set_to_zero() -> None:
    """The same claim without the analysis: zeros where the next layer reads."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16).double()
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Sigmoid(), nn.Conv2d(6, 2, 1)).double().eval()
    graph = capture(model, images)
    cut(graph, {"0:out": [1, 4]})
    assert graph.tensor("0.weight").shape == (2, 3, 3, 3)
    model[3].weight.data[:, [0, 2, 3, 5]] = 0
    torch.testing.assert_close(graph(images), model(images), rtol=1e-12, atol=1e-12)


def test_heads_and_their_width_can_be_cut_together_and_the_scale_stays() -> None:
    model, images = ZOO["fused_attention"]()
    graph = double(capture(lively(model), images))
    keep, images = {"qkv:out[1]": [0, 3], "qkv:out[2]": [1, 2, 5]}, images.double()
    (reference,) = masked(graph, keep, images)
    cut(graph, keep)
    assert graph.tensor("qkv.weight").shape == (3 * 2 * 3, 24)
    torch.testing.assert_close(graph(images), reference, rtol=1e-10, atol=1e-12)


class MeanSquare(nn.Module):
    """The norm of most language models, by hand or PyTorch's own, on a stream that two layers fill."""

    def __init__(self, own: bool, eps: float | None) -> None:
        super().__init__()
        self.a, self.b, self.head, self.own = nn.Linear(4, 12), nn.Linear(12, 12), nn.Linear(12, 3), own
        self.norm = nn.RMSNorm(12, eps=eps)
        self.norm.weight.data.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.norm(x) if self.own else x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + (self.norm.eps or 0)) * self.norm.weight
        return self.head(x + self.b(y))


@pytest.mark.parametrize(("own", "eps"), [(True, None), (True, 0.1), (False, 0.1)])
def test_a_norm_by_the_mean_square_still_divides_by_as_many_channels_as_there_were(own: bool, eps: float | None) -> None:
    torch.manual_seed(0)
    model, x = MeanSquare(own, eps).double().eval(), torch.randn(2, 4).double()
    graph = capture(model, x)
    for keep, gone in (([0, 1, 2, 5, 6, 7, 8, 11], [3, 4, 9, 10]), ([0, 2, 3, 7], [1, 6, 7, 8])):  # twice: the factors are one number
        cut(graph, {"a:out": keep})
        with torch.no_grad():
            for layer in (model.a, model.b):
                layer.weight[gone], layer.bias[gone] = 0, 0
        torch.testing.assert_close(graph(x), model(x), rtol=1e-10, atol=1e-12)
    assert len(graph.find(torch.ops.aten.mul.Tensor)) == (1 if own else 3)


class ByHand(nn.Module):
    """Something is done to the numbers before they are squared, on the way through other shapes, and the mean taken over channels."""

    def __init__(self, before) -> None:
        super().__init__()
        self.a, self.b, self.head, self.before = nn.Linear(4, 12), nn.Linear(4, 12), nn.Linear(12, 3), before

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(torch.cat([self.a(x), self.b(x)], -1))
        y = y.view(-1, 2, 12).transpose(1, 2)
        return self.head(self.a(x) / (y.pow(2).mean(1) + 1e-5).sqrt().sum(-1, keepdim=True))


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        (lambda x: x, None),
        (lambda x: nn.functional.silu(x) * torch.sigmoid(x) / 2, None),
        (lambda x: x - x.mean(-1, keepdim=True), "mean reduces it"),
        (lambda x: x + 1, "mean reduces it"),
        (torch.exp, "mean reduces it"),
        (lambda x: 1 / (x.abs() + 1), "mean reduces it"),
        (lambda x: x**0, "mean reduces it"),
    ],
)
def test_a_mean_over_channels_is_cut_only_when_those_that_go_are_zero_there(before, reason: str | None) -> None:
    """A layer norm written out is none of these: the mean that is taken off fills the channels that are gone."""
    torch.manual_seed(0)
    model, x = ByHand(before).double().eval(), torch.randn(2, 4).double()
    graph = capture(model, x)
    assert axes(graph)["a:out"].reason == reason
    if reason is None:
        cut(graph, {"a:out": [0, 2, 3, 7]})
        with torch.no_grad():
            for layer in (model.a, model.b):
                layer.weight[[1, 4, 5, 6, 8, 9, 10, 11]] = layer.bias[[1, 4, 5, 6, 8, 9, 10, 11]] = 0
        torch.testing.assert_close(graph(x), model(x), rtol=1e-10, atol=1e-12)


def test_gradients_and_frozen_parameters_stay_what_they_were() -> None:
    graph = capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(2, 3))
    graph.tensor("0.bias").requires_grad_(False)
    graph(torch.ones(2, 3)).sum().backward()
    gradient = graph.tensor("2.weight").grad.clone()
    cut(graph, {"0:out": [0, 3]})
    assert not graph.tensor("0.bias").requires_grad
    assert torch.equal(graph.tensor("2.weight").grad, gradient[:, [0, 3]])


def test_the_scales_of_a_quantized_weight_are_cut_with_it() -> None:
    graph = capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(2, 3))
    (first, _) = graph.find(torch.ops.aten.linear.default)
    graph.set_tensor("scale", torch.tensor([0.1, 0.2, 0.3, 0.4]))
    graph.set_tensor("zero", torch.zeros(4, dtype=torch.int32))
    scale, zero = graph.attribute("scale", first), graph.attribute("zero", first)
    with graph.fx.inserting_before(first):
        node = graph.fx.call_function(torch.ops.aten.fake_quantize_per_channel_affine.default, (first.args[1], scale, zero, 0, -128, 127))
    first.update_arg(1, node)
    graph.recompile()
    graph.refresh()
    cut(graph, {"0:out": [1, 3]})
    assert graph.tensor("scale").tolist() == pytest.approx([0.2, 0.4])
    assert graph(torch.ones(2, 3)).shape == (2, 2)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"0:uot": [0]}, "'0:out'"),
        ({"2:out": [0]}, "output of the model"),
        ({"0:out": []}, r"0\.\.3"),
        ({"0:out": [2, 1]}, "increasing"),
        ({"0:out": [1, 4]}, r"0\.\.3"),
    ],
)
def test_what_cannot_be_cut_is_an_error_and_changes_nothing(keep: dict[str, list[int]], message: str) -> None:
    graph = capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(2, 3))
    before = graph.fingerprint()
    with pytest.raises(GraphError, match=message):
        cut(graph, keep)
    assert graph.fingerprint() == before
