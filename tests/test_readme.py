"""The README is true: its Python runs, its commands are commands, its recipe is a recipe, its table has every step."""

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer

import multum
from multum.cli import app
from multum.step import Recipe, methods

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^ {4}(multum .*?)(?: {2,}#.*)?$", TEXT, re.MULTILINE)


def block(kind: str, word: str) -> str:
    (found,) = [text for name, text in BLOCKS if name == kind and word in text]
    return found


def small_task() -> multum.Task:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, 2), torch.nn.BatchNorm2d(16), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 3, 2), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(32 * 9, 10),
    )  # fmt: skip
    data = [(torch.rand(32, 1, 16, 16), torch.randint(10, (32,))) for _ in range(4)]

    def agreement(predict, data):
        return torch.cat([100.0 * (predict(x).argmax(1) == model(x).argmax(1)) for x, _ in data])

    return multum.Task(model.eval(), data[0][0], data, data, data, data, torch.nn.functional.cross_entropy, agreement)


def test_the_dozen_lines_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(multum, "load_task", lambda path: small_task(), raising=False)
    code = block("python", "multum.search(task").replace("max_drop=0.5)", "max_drop=100, minutes=0.1)")
    exec(compile(code, "README.md", "exec"), {})
    assert {"out", "small.mip", "small.onnx"} <= {path.name for path in tmp_path.iterdir()}


def test_a_student_is_trained_like_this():
    names = {"multum": multum, "task": small_task()}
    exec(compile(block("python", "distill.student("), "README.md", "exec"), names)
    assert names["result"].graph.tensor("3.weight").shape == (16, 8, 3, 3)


def test_early_exits_run_like_this(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"multum": multum, "task": small_task()}
    exec(compile(block("python", "distill.exits("), "README.md", "exec"), names)
    assert names["outputs"].shape == (32, 10)
    assert multum.Session("early.onnx")(names["task"].example).shape == (32, 10)


def test_a_task_file_is_written_like_this(monkeypatch):
    sample = small_task()
    mine = ModuleType("mine")
    mine.__dict__.update(model=sample.model, train_batches=sample.train, test_batches=sample.test)
    monkeypatch.setitem(sys.modules, "mine", mine)
    code = block("python", "from mine import").replace("validation=...", "validation=test_batches")
    names = {"torch": torch, "cross_entropy": torch.nn.functional.cross_entropy}
    exec(compile(code, "README.md", "exec"), names)
    task = names["task"]()
    assert task.score(task.original, "test").shape == (128,)


def test_the_recipe_can_be_loaded(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(block("yaml", "quantize."))
    assert Recipe.load(file).to_data()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_are_understood(command):
    program = typer.main.get_command(app)
    _, name, *rest = shlex.split(command)
    sub = program.get_command(program.make_context("multum", [name, "--help"], resilient_parsing=True), name)
    assert sub is not None, f"there is no command {name!r}"
    sub.make_context(name, [*rest])  # raises for an option that is not there


def test_the_commands_are_found():
    assert {command.split()[1] for command in COMMANDS} >= {"analyze", "compress", "run", "bench", "export", "report", "steps"}


def test_every_step_is_in_the_table():
    named = set(re.findall(r"^\| `(\w+\.\w+)` \|", TEXT, re.MULTILINE))
    assert named == set(methods())
