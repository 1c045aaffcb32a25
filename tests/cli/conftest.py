"""A small real task, in a file as a user would write it, and one finished search on it."""

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from multum.cli import app

TASK = """
import torch
from torch import nn

import multum

print("the user's file prints to stdout")


def data(count, seed, size=100):
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    y = (x[:, :4] + x[:, 4:] ** 2 / 2).argmax(1)
    return list(zip(x.split(size), y.split(size)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 4)

    def forward(self, x):
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


def accuracy(predict, data):
    return torch.cat([100.0 * (predict(x).argmax(1) == y).float() for x, y in data])


def trained():
    torch.manual_seed(0)
    net, optimizer = Net(), None
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(8):
        for x, y in data(1000, 1):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net.eval()


def task(**parts):
    given = dict(train=data(500, 1), validation=data(500, 2), test=data(600, 3), loss=nn.functional.cross_entropy, metric=accuracy)
    return multum.Task(trained(), torch.zeros(4, 8), name="toy", **(given | parts))


def untested():
    return task(validation=None, test=None)


def nan():
    spoiled = data(500, 2)
    spoiled[3][0][5, 5] = float("nan")
    return task(validation=spoiled)


def nothing():
    return None
"""
ROWS = ((0.0, 8, True), (0.5, 8, True), (0.5, 4, False))


@dataclass
class Finished:
    """What a command left behind."""

    exit_code: int
    stdout: str
    stderr: str
    out: Path

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.out / "result.json").read_text())


@contextmanager
def brief() -> Iterator[None]:
    """Few rounds and few rungs: these tests are about what is said and written, not about how fast a toy is."""
    with pytest.MonkeyPatch.context() as patch:
        times, ladder = importlib.import_module("multum.search.times"), importlib.import_module("multum.search.ladder")
        patch.setattr(times, "_QUICK", {"rounds": 3, "seconds": 0.5})
        patch.setattr(times, "_FULL", {"rounds": 9, "seconds": 2.0})
        patch.setattr(times, "LARGE", 8)
        patch.setattr(importlib.import_module("multum.runtime.benchmark"), "_PROCESSES", 1)
        patch.setattr(importlib.import_module("multum.analyze.profile"), "_SECONDS", 0.1)
        patch.setattr(times, "installed", lambda: ["onnxruntime"])
        patch.setattr(ladder, "ROWS", ROWS)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def _brief() -> Iterator[None]:
    with brief():
        yield


@pytest.fixture(scope="session")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "task.py"
    path.write_text(TASK)
    return path


def multum(*arguments: object, out: Path | None = None) -> Finished:
    """Runs a command line in this process."""
    words = [str(word) for word in arguments] + (["--out", str(out)] if out else [])
    done = CliRunner().invoke(app, words)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Finished(done.exit_code, done.stdout, done.stderr, out or Path())


@pytest.fixture(scope="session")
def finished(task_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A search that met its target."""
    with brief():
        return multum("compress", task_file, "--size", "1/3", "--max-drop", "5", "--json", out=tmp_path_factory.mktemp("finished"))
