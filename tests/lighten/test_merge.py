"""Exact fusion and branches for training: equal before and after, as cheap as told, and only where it pays."""

import pytest
import torch
from torch import nn

from multum import Task, compress
from multum.errors import StepError
from multum.graph import layers
from multum.lighten import Merge, Reparameterize
from multum.lighten.affine import Affine, added, chained


class Sum(nn.Module):
    def __init__(self, *parts: nn.Module):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = self.parts[0](x)
        for part in self.parts[1:]:
            total = total + part(x)
        return total


def stirred(model: nn.Module) -> nn.Module:
    """Batch norms with statistics and scales of their own."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(value)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def norm(*parts: nn.Module, channels: int = 6) -> nn.Sequential:
    return nn.Sequential(*parts, nn.BatchNorm2d(channels))


def conv(size, inputs: int = 6, outputs: int = 6, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, **options)


ONE = {
    "three and one": Sum(norm(conv(3, padding=1)), norm(conv(1)), norm()),
    "strided": Sum(conv(3, stride=2, padding=1), conv(1, stride=2, bias=False)),
    "lines": Sum(conv(5, padding=2), conv((1, 5), padding=(0, 2)), conv((3, 1), padding=(1, 0))),
    "dilated": Sum(conv(3, padding=2, dilation=2), conv(1)),
    "depthwise": Sum(conv(3, padding=1, groups=6), norm(conv(1, groups=6))),
    "residual": Sum(nn.Identity(), norm(conv(3, padding=1))),
    "average": Sum(conv(3, padding=1), norm(conv(1, bias=False), nn.AvgPool2d(3, 1, 1))),
    "first a point": nn.Sequential(conv(1, 6, 9, bias=False), conv(3, 9, 6, padding=1)),
    "first a point with a bias": nn.Sequential(conv(1, 6, 9), conv(3, 9, 6)),
    "a point last": nn.Sequential(conv(3, 6, 9, padding=1), conv(1, 9, 6)),
    "three points": nn.Sequential(conv(1, 6, 9), conv(1, 9, 8), norm(conv(1, 8, 6))),
    "a word for padding": Sum(conv(3, padding="same"), conv(1)),
}
NOT = {
    "a bias before padding": nn.Sequential(conv(1, 6, 9), conv(3, 9, 6, padding=1)),
    "a norm before padding": nn.Sequential(norm(conv(1, 6, 9, bias=False), channels=9), conv(3, 9, 6, padding=1)),
    "between": nn.Sequential(conv(1, 6, 9), nn.ReLU(), conv(1, 9, 6)),
    "shifted": Sum(conv(3, padding=1), conv(3, padding=1, dilation=1, stride=1, groups=2)),
    "two windows": nn.Sequential(conv(3, padding=1, bias=False), conv(3, padding=1)),
}


@pytest.mark.parametrize("name", ONE)
def test_these_become_one_layer_that_computes_the_same(name):
    task = Task(stirred(ONE[name]), torch.randn(2, 6, 8, 8))
    merged = compress(task, Merge()).graph
    assert [layer.kind for layer in layers(merged)] == ["conv"]
    expected = task.original(task.example)
    torch.testing.assert_close(merged(task.example), expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))
    assert merged(torch.randn(3, 6, 8, 8)).shape[0] == 3


@pytest.mark.parametrize("name", NOT)
def test_these_do_not(name):
    task = Task(stirred(NOT[name]), torch.randn(2, 6, 8, 8))
    plan = Merge().plan(task.original, task)
    assert not plan.changes
    assert set(plan.skipped.values()) == {"nothing linear is beside it"}


def test_linear_layers_in_a_chain_become_one_where_it_costs_no_more():
    task = Task(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2), nn.Linear(2, 8)).eval(), torch.randn(3, 8))
    result = compress(task, Merge())
    assert result.records[0].changes == {"0": {"with": ["1"], "macs": [256, 64]}}
    assert result.records[0].skipped == dict.fromkeys("34", "as one layer it would cost more")
    torch.testing.assert_close(result.graph(task.example), task.original(task.example), rtol=1e-5, atol=1e-6)


def test_layers_that_are_excluded_stay():
    task = Task(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)), torch.randn(3, 8))
    assert Merge(exclude="1").plan(task.original, task).skipped == {"0": "nothing linear is beside it", "1": "excluded by name"}


def test_algebra_by_hand():
    def one(weight, bias, padding):
        return Affine("x", torch.tensor(weight).reshape(1, 1, -1), torch.tensor([bias]), (1,), (padding,), (1,))

    wide, point = one([1.0, 2.0, 3.0], 4.0, 1), one([5.0], 6.0, 0)
    total = added(wide, point)
    assert total.weight.flatten().tolist() == [1, 7, 3]
    assert total.bias.tolist() == [10]
    assert chained(wide, point).weight.flatten().tolist() == [5, 10, 15]
    assert chained(wide, point).bias.tolist() == [26]
    assert chained(point, wide) is None
    assert chained(point, one([1.0, 2.0, 3.0], 4.0, 0)).bias.tolist() == [40]
    assert added(wide, one([5.0], 6.0, 1)) is None


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


@pytest.fixture(scope="module")
def task() -> Task:
    batches = [(torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(seed)), torch.arange(32) % 3) for seed in (0, 1, 2)]
    return Task(Images().eval(), batches[0][0][:2], train=batches, validation=batches, loss=nn.functional.cross_entropy)


@pytest.mark.parametrize("branches", ["repvgg", "acb", "dbb"])
def test_branches_begin_without_a_say_learn_and_merge_exactly(task, branches):
    wide = compress(task, Reparameterize(branches=branches, epochs=0)).graph
    more = {"repvgg": 3, "acb": 4, "dbb": 8}[branches]
    assert len([layer for layer in layers(wide) if layer.kind == "conv"]) == 3 + more - (branches == "repvgg")
    torch.testing.assert_close(wide(task.example), task.original(task.example))
    for name, parameter in wide.tensors.named_parameters():
        if name.endswith("_norm.scale"):
            nn.init.normal_(parameter)
    wide.train()
    for inputs, _ in task.train:
        wide(inputs)
    wide.eval()
    merged, step = wide.copy(), Merge()
    step.apply(merged, step.plan(merged, task), task, None)
    expected = wide(task.train[0][0])
    assert float((expected - task.original(task.train[0][0])).detach().abs().max()) > 0.01
    torch.testing.assert_close(merged(task.train[0][0]), expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))
    assert len([layer for layer in layers(merged) if layer.kind == "conv"]) == 3


def test_training_with_branches_leaves_the_network_as_it_was_built(task):
    result = compress(task, Reparameterize(epochs=2.0, learning_rate=1e-2))
    assert [layer.node.target for layer in layers(result.graph) if layer.kind == "conv"] == [
        layer.node.target for layer in layers(task.original) if layer.kind == "conv"
    ]
    assert result.records[0].measured["loss_last"] < result.records[0].measured["loss_first"]
    assert result.records[0].changes == {
        "body.0": {"branches": "repvgg", "identity": False},
        "body.3": {"branches": "repvgg", "identity": True},
    }
    other = "it is no convolution with a weight of its own"
    assert result.records[0].skipped == {"body.1": other, "body.5": "its window is a point", "head": other}


def test_what_is_refused(task):
    with pytest.raises(StepError, match="branches is 'repvg'"):
        Reparameterize(branches="repvg")
    with pytest.raises(StepError, match="epochs is -1"):
        Reparameterize(epochs=-1)
    with pytest.raises(StepError, match="needs `train`"):
        compress(Task(task.model, task.example), Reparameterize())
