"""Answers of the teacher are computed once for each sample, and are the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from multum.graph import capture
from multum.task import call
from multum.train import Teacher
from multum.train.memory import _ROW, Memory

torch.set_num_threads(1)


class Two(nn.Module):
    """Ids and numbers in, a dict out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer = nn.Embedding(50, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor, scale: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.table(ids).mean(1) * scale[:, None])
        return {"logits": self.layer(hidden), "hidden": hidden}


class Asked:
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, x: Tensor) -> list[Tensor]:
        self.sizes.append(len(x))
        return [x.sum(1), x * 2]


@settings(max_examples=30, deadline=None)
@given(batches=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=9), min_size=1, max_size=8), room=st.integers(0, 14))
def test_every_answer_is_right_and_no_sample_is_asked_for_twice_while_there_is_room(batches: list[list[int]], room: int) -> None:
    samples = torch.randn(13, 5, generator=torch.Generator().manual_seed(1))
    memory, asked = Memory(room * (_ROW + 24)), Asked()
    for rows in batches:
        sums, doubles = memory(samples[rows], asked)
        torch.testing.assert_close(sums, samples[rows].sum(1))
        torch.testing.assert_close(doubles, samples[rows] * 2)
        assert sum(rows.nbytes for rows in memory.rows) <= room * 24
    if room > 12 and all(len(set(rows)) == len(rows) for rows in batches):
        assert sum(asked.sizes) == len({row for rows in batches for row in rows})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool, torch.float16])
def test_samples_that_differ_in_one_bit_are_two(dtype: torch.dtype) -> None:
    x = torch.zeros(65, 64).to(dtype)
    x[torch.arange(64), torch.arange(64)] = 1
    memory = Memory(1 << 20)
    assert len(set(memory._keys(x, 65))) == 65
    assert memory._keys(x[3:5].clone(), 2) == memory._keys(x, 65)[3:5]


def test_what_is_never_the_same_is_given_up_when_the_memory_is_full() -> None:
    memory, asked = Memory(20 * (_ROW + 24)), Asked()
    for _ in range(10):
        memory(torch.randn(8, 5), asked)
    assert memory.limit == 0
    assert not memory.rows
    assert sum(asked.sizes) == 80


def test_answers_that_are_not_of_single_samples_are_not_kept() -> None:
    memory, sizes = Memory(1 << 20), []

    def ask(x: Tensor) -> list[Tensor]:
        sizes.append(len(x))
        return [x.mean(0)]

    x = torch.randn(8, 5)
    for _ in range(2):
        torch.testing.assert_close(memory(x, ask)[0], x.mean(0))
    assert sizes == [8, 8]


def test_a_teacher_remembers_outputs_and_hidden_values_of_nested_inputs() -> None:
    model = Two()
    inputs = {"ids": torch.randint(0, 50, (12, 6)), "scale": torch.rand(12)}
    graph = capture(model, inputs)
    seen = graph.find(torch.ops.aten.relu.default)
    teacher, fresh, bits = Teacher(graph, seen, 1 << 20), Teacher(graph, seen), graph.fingerprint()
    teacher(inputs)
    asked: list[int] = []
    ask = teacher._ask
    teacher._ask = lambda x: asked.append(1) or ask(x)  # type: ignore[method-assign]
    order = torch.randperm(12)[:7]
    some = {name: value[order] for name, value in inputs.items()}
    ours, theirs = teacher(some), fresh(some)
    assert not asked
    for name in ("logits", "hidden"):
        torch.testing.assert_close(ours[name], theirs[name])
    torch.testing.assert_close(teacher.hidden[0], fresh.hidden[0])
    assert graph.fingerprint() == bits


def test_a_teacher_in_training_mode_is_asked_as_for_use() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    x = torch.randn(16, 4)
    graph = capture(model, x)
    wanted, bits = call(graph.eval(), x), graph.fingerprint()
    torch.testing.assert_close(Teacher(graph.train())(x), wanted, rtol=1e-4, atol=1e-5)
    assert graph.eval().fingerprint() == bits
