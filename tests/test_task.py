"""A task, what is checked of it, how it is scored, and how it is loaded from a file."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from multum import Task, load_task
from multum.errors import TaskError
from multum.task import call, labels, logits, tensors

EXAMPLE = torch.randn(2, 3)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def batches(count=2, size=4):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 3, generator=generator), torch.zeros(size, dtype=torch.long)) for _ in range(count)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "resnet"}, "The task's model is a str"),
        ({"loss": 3}, "The task's loss is a int"),
        ({"metric": "accuracy"}, "The task's metric is a str"),
        ({"fit": 1}, "The task's fit is a int"),
        ({"train": iter(batches())}, r"train data can be run through only once \(list_iterator\)"),
        ({"test": (b for b in batches())}, r"test data can be run through only once \(generator\)"),
        ({"example": torch.tensor([[float("nan"), 0, 0]])}, "The example holds NaN"),
        ({"example": {"x": (torch.ones(1), torch.tensor([float("inf")]))}}, "The example holds NaN or infinite"),
    ],
)
def test_wrong_parts_are_refused(options, message):
    with pytest.raises(TaskError, match=message) as caught:
        Task(**({"model": model(), "example": EXAMPLE} | options))
    assert caught.value.expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "The validation data are empty"),
        ([torch.ones(2, 3)], "A batch of the validation data is a Tensor"),
        ([(torch.ones(2, 3),)], "A batch of the validation data is a tuple"),
        ([(torch.full((2, 3), float("nan")), torch.zeros(2))], "The validation data holds NaN"),
        ([(torch.ones(2, 3), torch.full((2,), float("inf")))], "The validation data holds NaN or infinite"),
    ],
)
def test_wrong_batches_are_refused_as_they_come_by(data, message):
    task = Task(model(), EXAMPLE, validation=data)
    with pytest.raises(TaskError, match=message):
        list(task.data("validation"))


def test_missing_data_are_named():
    with pytest.raises(TaskError, match="The task 'tiny' has no test data") as caught:
        Task(model(), EXAMPLE, name="tiny").data("test")
    assert "`test`" in caught.value.expected


def test_training_data_serve_for_calibration():
    task = Task(model(), EXAMPLE, train=batches(3))
    assert len(list(task.data("calibration"))) == 3
    assert len(task.data("calibration")) == 3
    with pytest.raises(TaskError, match="no validation data"):
        task.data("validation")


def test_the_original_is_captured_once_and_frozen():
    task = Task(model(), EXAMPLE)
    assert task.original is task.original
    assert not any(p.requires_grad for p in task.original.parameters())
    assert not task.original.training


def test_without_a_metric_the_score_is_the_agreement_with_the_original():
    task = Task(model(), EXAMPLE, validation=batches())
    assert task.score(task.model).tolist() == [100.0] * 8
    assert task.score(lambda x: -task.model(x)).tolist() == [0.0] * 8


def test_scores_for_samples_or_one_number():
    task = Task(model(), EXAMPLE, validation=batches(), metric=lambda predict, data: torch.cat([predict(x)[:, 0] for x, _ in data]))
    assert task.score(lambda x: x * 0 + 3).tolist() == [3.0] * 8
    task.metric = lambda predict, data: 71
    assert task.score(task.model) == 71.0
    assert isinstance(task.score(task.model), float)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((2, 2)), r"an array of shape \(2, 2\)"),
        ([], r"shape \(0,\)"),
        ([1.0, float("nan")], "NaN or an infinite score"),
        (float("inf"), "NaN or an infinite score"),
    ],
)
def test_wrong_scores_are_refused(value, message):
    with pytest.raises(TaskError, match=message):
        Task(model(), EXAMPLE, validation=batches(), metric=lambda predict, data: value).score(lambda x: x)


def test_the_metric_sees_checked_data():
    task = Task(model(), EXAMPLE, validation=[torch.ones(2, 3)], metric=lambda predict, data: [float(x.sum()) for x, _ in data])
    with pytest.raises(TaskError, match="a pair"):
        task.score(lambda x: x)


def test_inputs_are_passed_by_position_or_by_name():
    assert call(lambda x: x + 1, torch.tensor(1)) == 2
    assert call(lambda x, y: x - y, (torch.tensor(5), torch.tensor(3))) == 2
    assert call(lambda x, y: x - y, {"y": torch.tensor(5), "x": torch.tensor(3)}) == -2


def test_tensors_logits_and_labels():
    outputs = {"ids": torch.ones(1, dtype=torch.long), "parts": (torch.tensor([[0.0, 2.0, 1.0]]), torch.zeros(1, 1))}
    assert len(list(tensors(outputs))) == 3
    assert logits(outputs).shape == (1, 3)
    assert labels(outputs).tolist() == [1]
    image = torch.zeros(1, 2, 2, 2)
    image[0, 1, 0, 0] = 1
    assert labels(image).tolist() == [[[1, 0], [0, 0]]]
    with pytest.raises(TaskError, match="no floating-point tensor"):
        logits({"ids": torch.ones(1, dtype=torch.long), "name": "x"})


# --- loading -------------------------------------------------------------------------------------------------------

SOURCE = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from multum import Task
from neighbour import WIDTH

@dataclass
class Options:
    width: int = WIDTH

def task():
    from later import name
    return Task(torch.nn.Linear(Options().width, 2), torch.randn(2, WIDTH), name=name)

def other():
    return 3
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "task.py").write_text(SOURCE)
    (tmp_path / "neighbour.py").write_text("WIDTH = 5\n")
    (tmp_path / "later.py").write_text("name = 'mine'\n")
    return tmp_path


@pytest.mark.parametrize("suffix", ["", ":task"])
def test_a_file_gives_its_task_and_may_import_its_neighbours(folder, suffix):
    before = list(sys.path)
    task = load_task(f"{folder / 'task.py'}{suffix}")
    assert task.model.in_features == 5
    assert task.name == "mine"
    assert sys.path == before
    assert "neighbour" not in sys.modules
    assert "later" not in sys.modules


def test_two_folders_with_the_same_names_do_not_mix(folder, tmp_path_factory):
    second = tmp_path_factory.mktemp("second")
    (second / "task.py").write_text(SOURCE)
    (second / "neighbour.py").write_text("WIDTH = 7\n")
    (second / "later.py").write_text("name = 'other'\n")
    assert load_task(folder / "task.py").model.in_features == 5
    assert load_task(second / "task.py").model.in_features == 7


def test_a_module_gives_its_task(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    (folder / "tasks_of_a_package.py").write_text(SOURCE)
    assert load_task("tasks_of_a_package:task").name == "mine"


@pytest.mark.parametrize(
    ("reference", "message", "near"),
    [
        ("tusk.py", r"There is no task file '.*tusk\.py'", "task.py"),
        ("task.py:tsk", "has no function 'tsk'", "'task'"),
        ("task.py:other", r"other\(\) of .* returned a int", "a multum.Task"),
        ("broken.py", r"broken\.py' fails: SyntaxError", "a file that can be imported"),
        ("failing.py", r"failing\.py' fails: ValueError: no data", "a file that can be imported"),
    ],
)
def test_files_that_give_no_task(folder, reference, message, near):
    (folder / "broken.py").write_text("def task(:\n")
    (folder / "failing.py").write_text("raise ValueError('no data')\n")
    with pytest.raises(TaskError, match=message) as caught:
        load_task(folder / reference)
    assert near in caught.value.expected
    assert not [name for name in sys.modules if name.startswith("multum_task_") and "broken" in str(sys.modules[name])]


def test_a_module_that_is_missing():
    with pytest.raises(TaskError, match=r"The task 'no\.such\.module' cannot be imported"):
        load_task("no.such.module")
