"""Early exits: trained beside the network, kept in its file, and each sample goes only as far as it must."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from multum import Session, Task, compress, distill, export, load, save
from multum.errors import StepError
from multum.graph import capture
from multum.graph.split import graft, split
from multum.step import Result
from multum.task import call
from multum.testing.zoo import ZOO

torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.conv(x)))


def net() -> nn.Module:
    torch.manual_seed(0)
    blocks = [Block(12) for _ in range(4)]
    return nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3))


def stripes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Stripes across or down, or none, in noise of which some images have much."""
    random = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 3, (count,), generator=random)
    lines = (torch.arange(8) % 2).float() * 2 - 1
    images = torch.stack([lines[:, None].expand(8, 8), lines[None].expand(8, 8), torch.zeros(8, 8)])[kind][:, None]
    noise = 0.3 + 1.7 * (torch.rand(count, 1, 1, 1, generator=random) < 0.3)
    return images + noise * torch.randn(count, 1, 8, 8, generator=random), kind


def accuracy(predict: object, data: object) -> Tensor:
    return torch.cat([100.0 * (predict(x).argmax(1) == y) for x, y in data])


@pytest.fixture(scope="module")
def task() -> Task:
    x, y = stripes(512, 0)
    data = list(zip(x.split(32), y.split(32), strict=True))
    made = Task(net(), x[:2], train=data, validation=[stripes(256, 1)], loss=nn.functional.cross_entropy, metric=accuracy)
    teacher = compress(made, distill.Logits(alpha=0.0, epochs=6, learning_rate=0.01)).graph
    return Task(teacher, x[:2], train=data, validation=made.validation, loss=made.loss, metric=accuracy)


@pytest.fixture(scope="module")
def trained(task: Task) -> Result:
    return compress(task, distill.Self(exits=(0.25, 0.5), hidden=16, epochs=4, learning_rate=5e-3))


def test_the_plan_says_where_the_exits_are(task: Task) -> None:
    plan = distill.Self(exits=(0.25, 0.5)).plan(task.original, task)
    assert [share for *_, share in plan.changes["*"]["exits"]] == pytest.approx([0.25, 0.5], abs=0.06)


def test_exits_come_out_of_the_file_and_at_a_threshold_of_two_nothing_changes(task: Task, trained: Result, tmp_path: Path) -> None:
    save(trained, tmp_path / "early.mip", task)
    loaded = load(tmp_path / "early.mip")
    parts = distill.exits(loaded)
    assert len(parts) == 3
    x = stripes(9, 2)[0]
    with torch.no_grad():
        torch.testing.assert_close(distill.Cascade(parts, 2.0)(x), loaded(x))
        torch.testing.assert_close(loaded(x), trained.graph(x))
        at_first = distill.Cascade(parts, 0.0)
        assert at_first(x).shape == (9, 3)
    assert at_first.left.tolist() == [0] * 9
    assert trained.records[0].measured["exits"][0] == pytest.approx(
        float(task.score(distill.Cascade(distill.exits(trained.graph), 0.0)).mean())
    )


def test_easy_samples_leave_early_and_the_rest_go_on(task: Task, trained: Result) -> None:
    cascade = distill.Cascade(distill.exits(trained.graph))
    table = cascade.settle(task, drop=2.0)
    full = table[2.0]
    score, depth = table[cascade.threshold]
    assert full == (pytest.approx(float(task.score(trained.graph).mean())), 3.0)
    assert score >= full[0] - 2.0
    assert depth < 2.5
    x = stripes(64, 3)[0]
    together = cascade(x)
    assert len(set(cascade.left.tolist())) > 1
    torch.testing.assert_close(torch.cat([cascade(one) for one in x.split(1)]), together, rtol=1e-4, atol=1e-5)
    assert float(task.score(trained.graph).mean()) > float(task.score(task.original).mean()) - 3


def test_each_part_can_be_exported_and_run_by_an_engine(trained: Result, tmp_path: Path) -> None:
    parts = distill.exits(trained.graph)
    for place, part in enumerate(parts):
        export(part, tmp_path / f"{place}.onnx")
    sessions = [Session(tmp_path / f"{place}.onnx", engine="onnxruntime", threads=1) for place in range(3)]
    x = stripes(8, 4)[0]
    torch.testing.assert_close(distill.Cascade(sessions, 0.9)(x), distill.Cascade(parts, 0.9)(x), rtol=1e-3, atol=1e-4)


def test_one_file_stops_where_it_is_sure(trained: Result, tmp_path: Path) -> None:
    cascade = distill.Cascade(distill.exits(trained.graph), 0.9)
    session = Session(cascade.export(tmp_path / "early.onnx"), engine="onnxruntime", threads=1)
    x = stripes(40, 4)[0]
    expected = cascade(x)
    assert len(set(cascade.left.tolist())) > 1
    torch.testing.assert_close(session(x), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.cat([session(one) for one in x.split(1)]), expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(StepError, match="parts are not graphs"):
        distill.Cascade([session, session]).export(tmp_path / "again.onnx")


@pytest.mark.parametrize("name", ["convnext", "swin", "bert", "lstm", "densenet", "t5", "wavenet"])
def test_parts_in_a_row_are_the_whole(name: str) -> None:
    model, example = ZOO[name]()
    graph = capture(model, example)
    from multum.distill.places import points

    found = points(graph)
    ends = [found[len(found) // 3], found[2 * len(found) // 3]] if len(found) > 2 else found[:1]
    results = call(graph, example)
    part, inputs = None, example
    parts = split(graph, ends, [[] for _ in ends])
    for part in parts:
        inputs = call(part, inputs)
    torch.testing.assert_close(inputs, results)
    assert sum(p.numel() for part in parts for p in part.parameters()) >= sum(p.numel() for p in graph.parameters())


def test_a_graft_reads_what_it_stands_behind() -> None:
    torch.manual_seed(0)
    graph, other = capture(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)), torch.randn(2, 4)), nn.Linear(5, 3)
    first = graph.find(torch.ops.aten.linear.default)[0]
    graph.tap([graft(graph, first, capture(other, torch.randn(2, 5)), "side")])
    x = torch.randn(3, 4)
    graph(x)
    weight, bias = graph.tensor("0.weight"), graph.tensor("0.bias")
    torch.testing.assert_close(graph.tapped[0], other(x @ weight.T + bias))
    assert graph.tensor("side.weight").shape == (3, 5)


@pytest.mark.parametrize(
    ("options", "said"), [({"exits": ()}, "exits are given"), ({"exits": (1.0,)}, "exits are given"), ({"baseline": True}, "labels alone")]
)
def test_what_cannot_be_is_refused(task: Task, options: dict, said: str) -> None:
    with pytest.raises(StepError, match=said):
        compress(task, distill.Self(**options))


def test_outputs_of_which_nobody_is_sure_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    x = torch.randn(4, 4)
    with pytest.raises(StepError, match="when the outputs are sure"):
        compress(Task(model, x, train=[(x, torch.zeros(4, 1))]), distill.Self())
    with pytest.raises(StepError, match="has no exits"):
        distill.exits(capture(model, x))
