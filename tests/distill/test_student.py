"""Students cut out of their teacher, and students that the user brings."""

import pytest
import torch
from torch import Tensor, nn

from multum import Task, compress, distill
from multum.errors import StepError
from multum.graph import capture
from multum.graph.residual import blocks
from multum.task import call
from multum.testing.zoo import ZOO

torch.set_num_threads(1)


class Layer(nn.Module):
    """A transformer's layer with norms behind its sums, without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 32), nn.Linear(32, 8)
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x + self.mix(x))
        return self.second(x + self.down(torch.relu(self.up(x))))


def stack(count: int = 6, classes: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer() for _ in range(count)), nn.Linear(8, classes))


def task_of(model: nn.Module) -> Task:
    torch.manual_seed(1)
    data = [(torch.randn(16, 8), torch.randint(0, 3, (16,))) for _ in range(8)]
    return Task(model, data[0][0], train=data, validation=data, loss=nn.functional.cross_entropy)


@pytest.mark.parametrize(("depth", "left"), [(0.5, [0, 2, 4]), (1 / 3, [0, 3]), (0.1, [0]), (2 / 3, [0, 1, 3, 4])])
def test_whole_layers_go_evenly_spread_and_what_is_left_is_the_teachers(depth: float, left: list[int]) -> None:
    model = stack()
    teacher = capture(model, torch.randn(2, 8))
    found = distill.student(teacher, width=1.0, depth=depth)
    assert sorted({int(name.split(".")[0]) for name, _ in found.named_tensors()}) == [*left, 6]
    x = torch.randn(4, 8)
    with torch.no_grad():
        torch.testing.assert_close(found(x), nn.Sequential(*(model[place] for place in [*left, 6]))(x))
    assert len(blocks(teacher)) == 12  # the teacher is as it was


@pytest.mark.parametrize("name", ["convnext", "vit", "bert"])
def test_width_and_depth_on_real_networks(name: str) -> None:
    model, example = ZOO[name]()
    teacher = capture(model, example)
    bits = teacher.fingerprint()
    found = distill.student(teacher, width=0.5, depth=0.5)
    assert teacher.fingerprint() == bits
    assert 0.05 < sum(p.numel() for p in found.parameters()) / sum(p.numel() for p in teacher.parameters()) < 0.8
    assert len(blocks(found)) < len(blocks(teacher))
    call(found, example)


@pytest.mark.parametrize(("shares", "told"), [((0.0, 1.0), "width is 0.0"), ((1.0, 1.5), "depth is 1.5"), ((0.5, 0.5), "nothing to")])
def test_bad_shares_and_teachers_are_refused(shares: tuple[float, float], told: str) -> None:
    with pytest.raises(StepError, match=told):
        distill.student(capture(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), torch.zeros(2, 8)), *shares)


def test_a_student_takes_the_place_of_the_copy_and_learns_from_the_original() -> None:
    task = task_of(stack())
    before = distill.student(task.original, width=1.0, depth=0.5)
    result = compress(task, distill.Logits(epochs=20, learning_rate=3e-3), student=before)
    (_, first), *_, (_, last) = result.records[0].measured["validation"]
    assert last > first
    assert len(blocks(result.graph)) == 6
    mine = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))  # a network of the user's own
    assert compress(task, distill.Logits(), student=mine).records[0].parameters == (195, 195)


def test_a_student_with_other_classes_is_refused() -> None:
    with pytest.raises(StepError, match=r"student gives an output \[16, 5\], the teacher an output \[16, 3\]"):
        compress(task_of(stack()), distill.Logits(), student=stack(2, 5))
