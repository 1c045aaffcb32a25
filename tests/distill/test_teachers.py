"""Several teachers, none in between, no labels, no data."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from multum import Task, compress, save
from multum.distill import Assistant, DataFree, Logits, Teachers, Unlabelled
from multum.distill.teachers import _Panel
from multum.errors import StepError
from multum.graph import Graph, capture
from multum.testing.zoo import ZOO

torch.set_num_threads(1)


class Fixed(nn.Module):
    """Gives its own answer to everything."""

    def __init__(self, *row: float) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.tensor(row))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1] * 0 + self.row


class Net(nn.Module):
    def __init__(self, width: int = 12, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm, self.head = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def blobs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images with stripes across, stripes down, or none, in noise."""
    random = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 3, (count,), generator=random)
    lines = (torch.arange(8) % 2).float() * 2 - 1
    across, down = lines[:, None].expand(8, 8), lines[None].expand(8, 8)
    images = torch.stack([across, down, torch.zeros(8, 8)])[kind][:, None]
    return images + 0.5 * torch.randn(count, 1, 8, 8, generator=random), kind


def accuracy(predict: object, data: object) -> Tensor:
    return torch.cat([100.0 * (predict(x).argmax(1) == y) for x, y in data])


@pytest.fixture(scope="module")
def task() -> Task:
    """A network that has learned to tell stripes."""
    x, y = blobs(512, 0)
    data = list(zip(x.split(32), y.split(32), strict=True))
    made = Task(Net(), x[:2], train=data, validation=[blobs(512, 1)], loss=nn.functional.cross_entropy, metric=accuracy)
    learned = compress(made, Logits(alpha=0.0, epochs=8, learning_rate=0.02)).graph
    assert made.score(learned).mean() > 95
    return Task(learned, x[:2], train=data, validation=made.validation, loss=made.loss, metric=accuracy)


def answers(best: bool, weights: tuple[float, ...], *rows: tuple[float, ...]) -> Tensor:
    graphs = [capture(Fixed(*row), torch.zeros(2, 4)) for row in rows]
    return _Panel(graphs, weights, best, 0.0)(torch.zeros(3, 4), torch.tensor([0, 1, 2]))


def test_teachers_are_averaged_by_weight_or_chosen_by_sample() -> None:
    a, b = (4.0, 0.0, 0.0), (0.0, 3.0, 8.0)
    torch.testing.assert_close(answers(False, (1, 3), a, b), torch.tensor([[1.0, 2.25, 6.0]] * 3))
    torch.testing.assert_close(answers(True, (1, 1), a, b), torch.tensor([a, a, b]))  # the second is surer of 2 than of 1
    with pytest.raises(StepError, match=r"teachers give \[\[3, 3\]\] and \[\[3, 2\]\]"):
        answers(False, (1, 1), a, (0.0, 1.0))


@pytest.mark.parametrize("choice", ["mean", "best"])
def test_a_student_learns_from_files_beside_the_original(task: Task, tmp_path: Path, choice: str) -> None:
    save(task.original, tmp_path / "same.mip")
    wrong = task.original.copy()
    wrong.set_tensor("head.weight", -wrong.tensor("head.weight"))
    save(wrong, tmp_path / "wrong.mip")
    files = tuple(str(tmp_path / name) for name in ("same.mip", "wrong.mip"))
    step = Teachers(files=files, choice=choice, alpha=1.0, epochs=10, learning_rate=0.02)
    bits = task.original.fingerprint()
    result = compress(task, step, student=Net(12, seed=5))
    assert result.records[0].changes["*"]["weights"] == [1.0, 1.0, 1.0]
    assert task.score(result.graph).mean() > 90  # two against one, or the one that is right
    assert task.original.fingerprint() == bits


@pytest.mark.parametrize(
    ("options", "said"),
    [({}, "no other teacher"), ({"files": "a.mip", "weights": (1.0,)}, "weights of 2"), ({"files": "a.mip", "choice": "worst"}, "worst")],
)
def test_teachers_that_cannot_be_are_refused(task: Task, options: dict[str, object], said: str) -> None:
    with pytest.raises(StepError, match=said):
        Teachers(**options).plan(task.original, task)


def test_which_teacher_is_right_needs_targets(task: Task) -> None:
    graphs = [task.original, task.original]
    with pytest.raises(StepError, match="least wrong"):
        _Panel(graphs, (1.0, 1.0), True, 0.0)(task.example, None)


def test_assistants_are_taught_one_after_the_other(task: Task) -> None:
    step = Assistant(widths=(0.75, 0.5), epochs=10, learning_rate=0.02)
    result = compress(task, step, student=Net(12, seed=6))
    assistants = result.records[0].changes["*"]["assistants"]
    assert [row[2] for row in assistants] == sorted((row[2] for row in assistants), reverse=True)
    assert all(row[2] < sum(p.numel() for p in task.original.parameters()) for row in assistants)
    assert len(result.records[0].measured["assistants"]) == 2
    assert task.score(result.graph).mean() > 90
    with pytest.raises(StepError, match="as many of both"):
        Assistant(widths=(0.5,), depths=(0.5, 0.5)).plan(task.original, task)


def test_no_labels_are_needed(task: Task) -> None:
    inputs = [(x, None) for x, _ in task.train]
    only = Task(task.model, task.example, calibration=inputs, validation=task.validation, metric=accuracy)
    result = compress(only, Unlabelled(epochs=10, learning_rate=0.02), student=Net(12, seed=5))
    assert task.score(result.graph).mean() > 90


def test_no_data_are_needed(task: Task) -> None:
    bare = Task(task.model, task.example)
    step = DataFree(samples=128, batch=64, descent=240, epochs=40, learning_rate=0.02)
    result = compress(bare, step, student=Net(12, seed=5))
    measured = result.records[0].measured
    assert measured["seen_as_drawn"] > 0.9
    assert measured["statistics_off"] < 0.2
    assert task.score(result.graph).mean() > 80
    assert "validation" not in measured


def test_inversion_meets_statistics_and_leaves_the_teacher_alone(task: Task) -> None:
    bits = task.original.fingerprint()
    far, near = (DataFree(samples=64, batch=64, descent=steps).inverted(task.original, 0, torch.device("cpu"))[1] for steps in (1, 60))
    assert near["statistics_off"] < 0.5 * far["statistics_off"]
    assert task.original.fingerprint() == bits


def test_inputs_that_cannot_be_moved_are_refused() -> None:
    model, example = ZOO["bert"]()
    with pytest.raises(StepError, match="not one tensor of numbers"):
        compress(Task(model, example), DataFree())
    assert isinstance(capture(model, example), Graph)
