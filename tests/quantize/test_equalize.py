"""Scales of channels that are moved: the network is the same, ranges are not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from multum.errors import StepError
from multum.graph import Graph, capture, layers
from multum.graph.model import aten
from multum.quantize import Equalize, Static, WeightOnly
from multum.quantize.equalize import read_scaled
from multum.step import compress
from multum.task import Task


def uneven(module: nn.Module) -> nn.Module:
    """Channels of very different sizes."""
    torch.manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear):
            layer.weight.data *= torch.exp(1.5 * torch.randn(len(layer.weight), *[1] * (layer.weight.ndim - 1)))
        if isinstance(layer, nn.BatchNorm2d | nn.LayerNorm):
            layer.weight.data = torch.exp(torch.randn_like(layer.weight))
            layer.bias.data = torch.randn_like(layer.bias)
    return module.eval()


class Block(nn.Module):
    """An attention-like sum: the normalization is read by a layer and by an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return y + self.down(nn.functional.gelu(self.up(y)))


def convolutions(act: Callable[[], nn.Module]) -> nn.Module:
    depth = [nn.Conv2d(8, 16, 3, 2, 1, groups=8), nn.BatchNorm2d(16), act(), nn.MaxPool2d(2)]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), act(), *depth, nn.Conv2d(16, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 4)
    )  # fmt: skip


def task(model: nn.Module, *shape: int) -> Task:
    torch.manual_seed(1)
    x = torch.randn(64, *shape)
    return Task(uneven(model), x[:2], calibration=[(part, 0) for part in x.split(16)])


IMAGES, TOKENS = (3, 14, 14), (5, 8)
CASES = {
    "convolutions": (lambda: convolutions(nn.ReLU), IMAGES, 3),
    "clipped": (lambda: convolutions(nn.ReLU6), IMAGES, 3),
    "normalization": (lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), TOKENS, 2),
}


def outputs(graph: Graph, task: Task) -> Tensor:
    with torch.no_grad():
        return torch.cat([graph(x) for x, _ in task.calibration])


@pytest.mark.parametrize("method", ["ranges", "smooth", "awq"])
@pytest.mark.parametrize("case", CASES)
def test_the_network_stays_the_same_and_its_weights_do_not(case: str, method: str) -> None:
    make, shape, several = CASES[case]
    given = task(make(), *shape)
    result = compress(given, Equalize(method=method))
    (record,) = result.records
    assert len(record.changes) == several - (method == "ranges" and case == "normalization")
    assert max(high / low for low, high in record.measured["scales"].values()) > 1.5
    torch.testing.assert_close(outputs(result.graph, given), outputs(given.original, given), rtol=1e-4, atol=1e-4)


def test_ranges_before_and_after_become_equal() -> None:
    given = task(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), 6)
    graph = compress(given, Equalize()).graph
    made, read = graph.tensor("0.weight").abs().amax(1), graph.tensor("2.weight").abs().amax(0)
    torch.testing.assert_close(made, read)
    before = given.original.tensor("0.weight").abs().amax(1) * given.original.tensor("2.weight").abs().amax(0)
    torch.testing.assert_close(made, before.sqrt())  # by hand: both are the geometric mean


def test_smoothing_by_hand() -> None:
    model = nn.Sequential(nn.LayerNorm(2, elementwise_affine=True), nn.Linear(2, 1, bias=False))
    given = task(model, 2)
    model[0].weight.data, model[0].bias.data = torch.tensor([0.0, 0.0]), torch.tensor([16.0, 1.0])
    model[1].weight.data = torch.tensor([[1.0, 4.0]])
    given = Task(model, given.example, calibration=given.calibration)
    graph = compress(given, Equalize(method="smooth")).graph  # sqrt(16 / 1) = 4 and sqrt(1 / 4) = 1/2, over their geometric mean
    factor = torch.tensor([4.0, 0.5]) / 2**0.5
    torch.testing.assert_close(graph.tensor("0.bias"), torch.tensor([16.0, 1.0]) / factor)
    torch.testing.assert_close(graph.tensor("1.weight"), torch.tensor([[1.0, 4.0]]) * factor)


def rounded(given: Task, *before: Equalize) -> float:
    """The mean squared error of the outputs, with weights of four bits."""
    graph = compress(given, [*before, WeightOnly(bits=4, edges=4, rounding="nearest")]).graph
    return float((outputs(graph, given) - outputs(given.original, given)).square().mean())


def test_equal_ranges_save_small_columns_from_large_ones() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1))
    given = task(model, *IMAGES)
    torch.nn.init.normal_(model[2].weight)
    model[2].weight.data /= model[0].weight.data.abs().amax((1, 2, 3))[:, None, None]
    given = Task(model, given.example, calibration=given.calibration)
    assert rounded(given, Equalize()) < 0.9 * rounded(given)


def test_weights_that_meet_large_activations_are_rounded_more_finely() -> None:
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 32))
    given = task(model, 64)
    model[0].weight.data, model[0].bias.data = torch.ones(64), torch.zeros(64)
    model[0].weight.data[[5, 40]] = 15.0
    given = Task(model, given.example, calibration=given.calibration)
    assert rounded(given, Equalize(method="awq")) < 0.8 * rounded(given)


def test_a_channel_that_is_clipped_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU6(), nn.Conv2d(2, 2, 1))
    given = task(model, *IMAGES)
    model[0].weight.data, model[0].bias.data = torch.zeros(2, 3, 1, 1), torch.tensor([7.0, 0.1])
    given = Task(model, given.example, calibration=given.calibration)
    graph = compress(given, Equalize()).graph
    assert float(graph.tensor("0.bias").detach()[0]) == 7.0
    assert graph.tensor("0.bias").detach()[1] != pytest.approx(0.1)
    torch.testing.assert_close(outputs(graph, given), outputs(given.original, given))


@pytest.mark.parametrize("method", ["smooth", "awq"])
def test_where_no_layer_can_give_up_a_scale_one_is_put_in(method: str) -> None:
    given = task(Block(), *TOKENS)
    with pytest.raises(StepError, match="lets no scale pass"):
        compress(given, Equalize(method=method))
    result = compress(given, [Equalize(method=method, insert=True), Static()])
    assert {name: change["readers"] for name, change in result.records[0].changes.items()} == {"layer_norm": ["up"], "gelu": ["down"]}
    assert len(result.graph.find(aten.mul.Tensor)) == 2
    equal = compress(given, Equalize(method=method, insert=True)).graph
    torch.testing.assert_close(outputs(equal, given), outputs(given.original, given), rtol=1e-4, atol=1e-4)


def test_groups_of_a_convolution_take_up_their_own_scales() -> None:
    torch.manual_seed(0)
    layer, scale = nn.Conv2d(6, 4, 3, groups=2, bias=False), torch.rand(6) + 0.5
    x = torch.randn(2, 6, 5, 5)
    graph = capture(layer.eval(), x)
    (found,) = layers(graph)
    before = layer(x * scale[:, None, None])
    layer.weight.data = read_scaled(layer.weight.data, scale, found)
    torch.testing.assert_close(layer(x), before)


@pytest.mark.parametrize("options", [{"method": "even"}, {"strength": 1.5}, {"bits": 1}, {"samples": 0}], ids=str)
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(StepError, match=r"quantize\.Equalize"):
        Equalize(**options)


def test_without_data_clips_are_left_and_told() -> None:
    given = task(convolutions(nn.ReLU6), *IMAGES)
    (record,) = compress(Task(given.model, given.example), Equalize()).records
    assert list(record.changes) == ["7"]
    assert "no calibration data" in record.skipped["0"]
