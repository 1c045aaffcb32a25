"""`prune.Layers`: which layers become zero, and what takes over their mean."""

import pytest
import torch
from torch import Tensor, nn

from multum import Task, compress, prune
from multum.errors import StepError


class Network(nn.Module):
    """A stem and a head, through which everything goes, and four layers beside which there is a way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.inner = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.inner:
            x = x + torch.relu(layer(x))
        return self.head(x)


DATA = [(torch.randn(64, 6, generator=torch.Generator().manual_seed(seed)), torch.zeros(64)) for seed in range(2)]


@pytest.fixture(scope="module")
def task() -> Task:
    return Task(Network(), DATA[0][0], calibration=DATA)


def gone(task: Task, **options: object) -> list[str]:
    return list(prune.Layers(**options).plan(task.original, task).changes)


def test_every_other_layer_that_is_not_the_only_way(task: Task) -> None:
    assert gone(task) == ["inner.1", "inner.3"]
    assert gone(task, start=0) == ["inner.0", "inner.2"]
    assert gone(task, every=3) == ["inner.1"]
    assert gone(task, every=1, start=0, include="inner.[03]") == ["inner.0", "inner.3"]
    assert prune.Layers().plan(task.original, task).skipped == {
        "stem": "without it an output would not depend on the inputs",
        "inner.0": "it is not its turn",
        "inner.2": "it is not its turn",
        "head": "without it an output would not depend on the inputs",
    }


def test_of_two_ways_one_stays() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) * self.right(x)

    task = Task(Two(), DATA[0][0])
    plan = prune.Layers(every=1, start=0).plan(task.original, task)
    assert list(plan.changes) == ["left"]
    assert plan.skipped == {"right": "without it and those before an output would not depend on the inputs"}


def test_weights_are_zero_for_good_and_biases_take_over_the_mean(task: Task) -> None:
    graph = compress(task, prune.Layers(include="inner.*", every=1, start=3)).graph
    assert graph.sparse == {"inner.3.weight"}
    assert not graph.tensor("inner.3.weight").any()
    model, x = task.model, torch.cat([x for x, _ in DATA])
    with torch.no_grad():
        x = model.stem(x)
        for layer in model.inner[:3]:
            x = x + torch.relu(layer(x))
        torch.testing.assert_close(graph.tensor("inner.3.bias"), model.inner[3](x).mean(0))
    bare = compress(task, prune.Layers(recover=False)).graph
    assert torch.equal(bare.tensor("inner.3.bias"), model.inner[3].bias)


def test_a_normalization_of_nothing_gives_its_mean() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
            nn.init.normal_(self.norm.running_mean)
            nn.init.normal_(self.norm.bias)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.norm(self.layer(x))

    task = Task(Normed(), DATA[0][0], calibration=DATA)
    graph, x = compress(task, prune.Layers(every=1, start=0)).graph, DATA[0][0]
    with torch.no_grad():
        torch.testing.assert_close(graph(x) - x, task.model.norm.bias.expand(64, 6), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{"every": 0}, {"start": -1}, {"samples": 0}])
def test_bad_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(StepError):
        prune.Layers(**options)


def test_nothing_to_zero_says_why() -> None:
    with pytest.raises(StepError, match="would not depend on the inputs"):
        compress(Task(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.zeros(2, 3)), prune.Layers())
