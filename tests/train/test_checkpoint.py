"""A training that is cut short goes on to the bits of one that was not."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from multum import compress, distill, prune
from multum.errors import TrainError
from multum.graph import Graph, capture
from multum.task import Task
from multum.train import Training, Unfreeze, checkpoint, fit, loop
from multum.train import optimizer as optimizers

torch.set_num_threads(1)


class Net(nn.Module):
    """Everything that has a state: weights, running statistics, random numbers in dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.relu(self.norm(self.conv(x))).mean((2, 3))))


class Noisy(TensorDataset):
    """Draws from torch's global random state for every sample, as augmentation does."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn(3, 6, 6), y


def make() -> Task:
    torch.manual_seed(5)
    x, y = torch.randn(48, 3, 6, 6), torch.randint(0, 4, (48,))
    train = DataLoader(Noisy(x, y), batch_size=8, shuffle=True)
    validation = DataLoader(TensorDataset(x, y), batch_size=24)
    return Task(
        Net(), x[:2], train=train, validation=validation, metric=lambda predict, data: torch.cat([predict(x).sum(1) for x, _ in data])
    )


class Cut(Exception):
    pass


def train(task: Task, folder: Path | None, how: Training, cut: int = 0) -> tuple[Graph, dict]:
    """Trains the same graph in the same way; raises in the middle of the step `cut`."""
    graph, calls = task.original.copy().requires_grad_(True), []

    def loss(inputs: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == cut:
            raise Cut
        return nn.functional.cross_entropy(outputs, targets)

    history = fit(graph, task, loss, how, folder)
    return graph, history | {"calls": len(calls)}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("cut", [2, 7, 10, 18])  # in the first pass, at the start of the second, in its middle, at the end
def test_resumed_training_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, cut: int) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    task, how = make(), Training(epochs=3, learning_rate=0.01, optimizer=optimizer)
    whole, history = train(task, None, how)
    with pytest.raises(Cut):
        train(task, tmp_path, how, cut)
    resumed, again = train(task, tmp_path, how)
    assert again["calls"] == 18 - (cut - 1)
    assert resumed.fingerprint() == whole.fingerprint()
    assert {key: again[key] for key in ("steps", "loss_first", "loss_last", "validation", "kept")} == {
        key: history[key] for key in ("steps", "loss_first", "loss_last", "validation", "kept")
    }


class Reversed(nn.Module):
    """The same tensors in another order, as a graph from a file may have them."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.norm, self.conv = nn.Linear(8, 4), nn.BatchNorm2d(8), nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def test_what_the_optimizer_remembers_goes_by_names() -> None:
    x = torch.randn(2, 3, 6, 6)
    before, after = capture(Net().eval(), x), capture(Reversed().eval(), x)
    assert [name for name, _ in before.tensors.named_parameters()] != [name for name, _ in after.tensors.named_parameters()]
    ours, theirs = (optimizers.optimizer(graph, Training(), torch.device("cpu")) for graph in (before, after))
    before(x).square().sum().backward()
    ours.step()
    checkpoint.restore_moments(theirs, after, checkpoint.moments(ours, before))
    for name, parameter in before.tensors.named_parameters():
        for key, value in ours.state[parameter].items():
            torch.testing.assert_close(theirs.state[dict(after.tensors.named_parameters())[name]][key], value, rtol=0, atol=0)
    after(x).square().sum().backward()
    theirs.step()  # a fused optimizer goes through memory: moments of another parameter would be of another size


def test_a_training_behind_a_step_from_its_file_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    calls = list[int]()

    def cut_short(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 8:
            raise Cut
        return nn.functional.cross_entropy(outputs, targets)

    steps = [prune.Channels(ratio=0.25), distill.Logits(epochs=3, learning_rate=0.01)]
    whole = compress(make().but(loss=nn.functional.cross_entropy), steps, workdir=tmp_path / "whole").graph
    with pytest.raises(Cut):
        compress(make().but(loss=cut_short), steps, workdir=tmp_path / "cut")
    resumed = compress(make().but(loss=nn.functional.cross_entropy), steps, workdir=tmp_path / "cut").graph
    assert resumed.fingerprint() == whole.fingerprint()


def test_a_finished_training_is_not_done_again(tmp_path: Path) -> None:
    task, how = make(), Training(epochs=1)
    first, _ = train(task, tmp_path, how)
    second, history = train(task, tmp_path, how)
    assert history["calls"] == 0
    assert history["steps"] == 6
    assert second.fingerprint() == first.fingerprint()
    assert [path.name for path in tmp_path.iterdir()] == ["training.safetensors"]


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    task = make()
    train(task, tmp_path, Training(epochs=1))
    with pytest.raises(TrainError, match="another training"):
        train(task, tmp_path, Training(epochs=2))


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-9], lambda data: b"\xff" * 64 + data[64:]])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, damage: object) -> None:
    task, file = make(), tmp_path / "training.safetensors"
    train(task, tmp_path, Training(epochs=1))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(TrainError, match=r"training\.safetensors' cannot be read"):
        train(task, tmp_path, Training(epochs=1))


def test_layers_are_freed_from_the_last_to_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    task, how = make(), Training(epochs=3, learning_rate=0.01)  # 18 steps
    moved: list[list[bool]] = []

    def taught(folder: Path | None, cut: int = 0) -> Graph:
        graph = task.original.copy().requires_grad_(True)
        begin, steps = {name: value.detach().clone() for name, value in graph.tensors.named_parameters()}, []

        def loss(inputs: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
            moved.append([not torch.equal(graph.tensor(name), begin[name]) for name in ("conv.weight", "norm.weight", "head.weight")])
            steps.append(1)
            if len(steps) == cut:
                raise Cut
            return nn.functional.cross_entropy(outputs, targets)

        fit(graph, task, loss, how, folder, [Unfreeze(0.5)])
        assert all(parameter.requires_grad for parameter in graph.parameters())
        return graph

    whole = taught(None)
    first = [[row[place] for row in moved].index(True) for place in range(3)]
    assert first == [7, 4, 1]  # freed after 2 / 3, 1 / 3 and none of the nine steps; what moved is seen one step later
    with pytest.raises(Cut):
        taught(tmp_path, cut=6)
    assert taught(tmp_path).fingerprint() == whole.fingerprint()


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_of_the_steps_is_a_share(share: float) -> None:
    with pytest.raises(TrainError, match="layers are freed"):
        Unfreeze(share)


PROGRAM = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_checkpoint import Training, loop, make, nn, fit
loop.CHECKPOINT_SECONDS = 0.0
task, calls = make(), []
graph = task.original.copy().requires_grad_(True)
def loss(inputs, outputs, targets):
    calls.append(1)
    if len(calls) == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    return nn.functional.cross_entropy(outputs, targets)
fit(graph, task, loss, Training(epochs=3, learning_rate=0.01), Path({folder!r}))
"""


@pytest.mark.slow
def test_a_killed_process_is_gone_on_with_in_another(tmp_path: Path) -> None:
    program = PROGRAM.format(here=str(Path(__file__).parent), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], timeout=250, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    task, how = make(), Training(epochs=3, learning_rate=0.01)
    whole, _ = train(task, None, how)
    resumed, history = train(task, tmp_path, how)
    assert history["calls"] == 18 - 9
    assert resumed.fingerprint() == whole.fingerprint()


SEVERAL = """
import sys
sys.path.insert(0, {here!r})
from test_checkpoint import Training, make, train
from pathlib import Path
from accelerate import PartialState
graph, history = train(make(), None, Training(epochs=2))
row = [PartialState().num_processes, history["calls"], history["steps"], graph.tensor("head.weight").sum().item()]
Path({folder!r}, f"{{PartialState().process_index}}.row").write_text(" ".join(map(str, row)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_two_processes_share_the_batches(tmp_path: Path, precision: str) -> None:
    program = tmp_path / "several.py"
    program.write_text(textwrap.dedent(SEVERAL.format(here=str(Path(__file__).parent), folder=str(tmp_path))))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program)]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": precision, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], timeout=280, capture_output=True, text=True, env=env)
    rows = [file.read_text().split() for file in tmp_path.glob("*.row")]
    assert len(rows) == 2, done.stdout + done.stderr
    assert rows[0] == rows[1]
    assert rows[0][:3] == ["2", "6", "6"]  # 6 batches a pass, 2 passes: three batches a pass for each
