"""Every width of an elastic network is a slice of the widest, learns, and comes out of its file."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from multum import Task, compress, distill, load, save
from multum.errors import StepError
from multum.export import to_onnx_bytes, verify
from multum.graph import Graph
from multum.step import Result

torch.set_num_threads(1)
WIDTHS = (1.0, 0.75, 0.5, 0.25)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.one = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.second, self.two = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(self.first(x)))
        return self.head(torch.relu(x + self.two(self.second(x))).mean((2, 3)))


def stripes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 3, (count,), generator=random)
    lines = (torch.arange(8) % 2).float() * 2 - 1
    images = torch.stack([lines[:, None].expand(8, 8), lines[None].expand(8, 8), torch.zeros(8, 8)])[kind][:, None]
    return images + 0.5 * torch.randn(count, 1, 8, 8, generator=random), kind


def accuracy(predict: object, data: object) -> Tensor:
    return torch.cat([100.0 * (predict(x).argmax(1) == y) for x, y in data])


@pytest.fixture(scope="module")
def task() -> Task:
    x, y = stripes(384, 0)
    data = list(zip(x.split(32), y.split(32), strict=True))
    made = Task(Net(), x[:2], train=data, validation=[stripes(256, 1)], loss=nn.functional.cross_entropy, metric=accuracy)
    teacher = compress(made, distill.Logits(alpha=0.0, epochs=6, learning_rate=0.02)).graph
    return Task(teacher, x[:2], train=data, validation=made.validation, loss=made.loss, metric=accuracy)


@pytest.fixture(scope="module")
def trained(task: Task) -> Result:
    return compress(task, distill.Elastic(epochs=8, learning_rate=0.01))


def size(graph: Graph) -> int:
    return sum(parameter.numel() for name, parameter in graph.tensors.named_parameters() if not name.startswith("elastic."))


def test_every_width_is_good_and_smaller(task: Task, trained: Result) -> None:
    found = distill.slices(trained.graph)
    assert sorted(found, reverse=True) == list(WIDTHS)
    assert [found[width].tensor("first.weight").shape[0] for width in WIDTHS] == [16, 12, 8, 4]
    assert [size(found[width]) for width in WIDTHS] == sorted({size(graph) for graph in found.values()}, reverse=True)
    assert all(float(task.score(graph).mean()) > 90 for graph in found.values())


def test_weights_are_slices_and_norms_are_not(trained: Result) -> None:
    found = distill.slices(trained.graph)
    rows = [row.flatten().tolist() for row in trained.graph.tensor("first.weight")]
    for width in WIDTHS[1:]:
        chosen = [rows.index(row.flatten().tolist()) for row in found[width].tensor("first.weight")]
        second = trained.graph.tensor("second.weight")[chosen][:, chosen]
        assert torch.equal(found[width].tensor("second.weight"), second)
        assert torch.equal(found[width].tensor("head.weight"), trained.graph.tensor("head.weight")[:, chosen])
        assert not torch.allclose(found[width].tensor("two.running_var"), trained.graph.tensor("two.running_var")[chosen], rtol=1e-2)


def test_one_file_holds_all_widths(task: Task, trained: Result, tmp_path: Path) -> None:
    save(trained, tmp_path / "elastic.mip", task)
    ours, theirs = distill.slices(trained.graph), distill.slices(load(tmp_path / "elastic.mip"))
    x = stripes(8, 2)[0]
    with torch.no_grad():
        for width in WIDTHS:
            assert torch.equal(ours[width](x), theirs[width](x))
    verify(theirs[0.5], to_onnx_bytes(theirs[0.5]))
    verify(theirs[1.0], to_onnx_bytes(theirs[1.0]))


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.body = nn.ModuleList(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)) for _ in range(4))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        for branch in self.body:
            x = torch.relu(x + branch(x))
        return self.head(x.mean((2, 3)))


def test_depths_leave_out_blocks_at_every_width(task: Task, tmp_path: Path) -> None:
    deep = Task(Deep(), task.example, train=task.train, validation=task.validation, loss=task.loss, metric=accuracy)
    teacher = compress(deep, distill.Logits(alpha=0.0, epochs=4, learning_rate=0.02)).graph
    job = Task(teacher, task.example, train=task.train, validation=task.validation, loss=task.loss, metric=accuracy)
    save(compress(job, distill.Elastic(widths=(0.5,), depths=(0.5,), epochs=8, learning_rate=0.01)), tmp_path / "elastic.mip", job)
    graph = load(tmp_path / "elastic.mip")
    whole, shallow = distill.slices(graph), distill.slices(graph, depth=0.5)
    assert sorted(whole) == sorted(shallow) == [0.5, 1.0]
    convolutions = [len(found.find(torch.ops.aten.conv2d.default)) for found in (whole[1.0], whole[0.5], shallow[1.0], shallow[0.5])]
    assert convolutions == [5, 5, 3, 3]
    assert torch.equal(shallow[1.0].tensor("body.0.0.weight"), graph.tensor("body.0.0.weight"))
    assert not torch.equal(shallow[1.0].tensor("body.0.1.running_var"), graph.tensor("body.0.1.running_var"))
    assert all(float(job.score(found).mean()) > 90 for found in (*whole.values(), *shallow.values()))
    with pytest.raises(StepError, match=r"Depth 0\.3 is asked for"):
        distill.slices(graph, depth=0.3)


def test_a_network_without_blocks_has_one_depth() -> None:
    plain = Task(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4), train=[(torch.randn(2, 4), torch.zeros(2))])
    with pytest.raises(StepError, match="no block to leave out"):
        compress(plain, distill.Elastic(depths=(0.5,)))


@pytest.mark.parametrize("widths", [(), (0.5, 0.5), (1.0,), (0.0,)])
def test_widths_that_cannot_be_are_refused(task: Task, widths: tuple[float, ...]) -> None:
    with pytest.raises(StepError, match="The widths are"):
        compress(task, distill.Elastic(widths=widths))


def test_a_graph_of_one_width_says_so(task: Task) -> None:
    with pytest.raises(StepError, match="the graph has one"):
        distill.slices(task.original)


def test_all_widths_see_what_the_widest_sees(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    from multum.distill import elastic
    from multum.train import augment

    monkeypatch.setitem(augment._ONE, "flip", lambda images: torch.full_like(images, 7.0))
    called = elastic._Slice.__call__
    monkeypatch.setattr(elastic._Slice, "__call__", lambda self, inputs: seen.append(inputs) or called(self, inputs))
    compress(task.but(validation=None), distill.Elastic(epochs=0.2, augment="flip"))
    assert seen
    assert all(bool((images == 7).all()) for images in seen)
