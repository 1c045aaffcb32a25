"""Channels pruned here and by Torch-Pruning, with the same fine-tuning: `python bench/prune_peers.py multum magnitude taylor`.

The network, the data, the loop, the passes and the seeds are the same; only what is cut differs. `--recipe near` is AdamW at 1e-3 on images
that are turned and moved; `away` is SGD at 0.05, away from the old minimum, on images moved by a pixel. Torch-Pruning 1.6.1 must be
installed: python -m pip install torch-pruning==1.6.1. Of its pruning layer by layer and over the whole network the one is taken that
scores better on validation data after a pass, for the first seed. Appends a line for each run to out/bench/prune_peers.jsonl; a run that
was stopped goes on where it was. `table` alone prints what is there.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import multum
from multum.analyze.statistics import compare
from multum.graph import Graph, capture
from multum.graph.axes import axes
from multum.prune import Channels, counts
from multum.train import Companion, Training, default_rate, recover

ROOT = Path(__file__).parents[1]
LINES = ROOT / "out/bench/prune_peers.jsonl"


def ours(task: multum.Task, macs: float, seed: int) -> Graph:
    return multum.compress(task, Channels(macs=macs, multiple=2)).graph


def uniform(task: multum.Task, macs: float, seed: int) -> Graph:
    """The same share everywhere, which keeps more parameters: 99,412 in place of 70,432 at 2.57 times fewer multiply-accumulates."""
    return multum.compress(task, Channels(macs=macs, multiple=2, allocation="uniform")).graph


def theirs(importance: str) -> Callable[[multum.Task, float, int], Graph]:
    def prune(task: multum.Task, macs: float, seed: int) -> Graph:
        return cut(task, importance, macs, _whole(importance))

    return prune


@cache
def _whole(importance: str) -> bool:
    """Whether pruning over the whole network is better than layer by layer, at 2.57 times fewer multiply-accumulates."""
    note = LINES.with_name(f"{importance}.json")
    if not note.is_file():
        task = multum.load_task(ROOT / "examples/fashion_mnist/task.py")
        scores = []
        for whole in (False, True):
            graph = cut(task, importance, 1 / 2.57, whole).requires_grad_(True)
            recover(graph, task, Training(epochs=1, patience=0))
            scores.append(float(task.score(graph, "validation").mean()))
        print(f"{importance}: layer by layer {scores[0]:.2f}, whole network {scores[1]:.2f} after a pass", file=sys.stderr)
        note.write_text(json.dumps(scores))
    layerwise, network = json.loads(note.read_text())
    return bool(network > layerwise)


def cut(task: multum.Task, importance: str, macs: float, whole: bool) -> Graph:
    """The network, pruned by Torch-Pruning until at most this share of its multiply-accumulates is left."""
    low, high = 0.0, 0.95
    for _ in range(10):
        middle = (low + high) / 2
        graph = attempt(task, importance, middle, whole)
        low, high = (low, middle) if left(task, graph) <= macs else (middle, high)
    return attempt(task, importance, high, whole)


def attempt(task: multum.Task, importance: str, ratio: float, whole: bool) -> Graph:
    import torch_pruning as tp

    sys.path.insert(0, str(ROOT / "examples/fashion_mnist"))
    from task import model as trained

    model: nn.Module = copy.deepcopy(trained()).eval()
    judge = {"magnitude": tp.importance.GroupMagnitudeImportance(p=2), "taylor": tp.importance.GroupTaylorImportance()}[importance]
    last = [module for module in model.modules() if isinstance(module, nn.Linear)]
    pruner = tp.pruner.BasePruner(model, task.example, importance=judge, pruning_ratio=ratio, global_pruning=whole, ignored_layers=last)
    if importance == "taylor":
        for images, labels in task.data("calibration"):
            nn.functional.cross_entropy(model(images), labels).backward()
    pruner.step()
    model.zero_grad()
    return capture(model, task.example)


def left(task: multum.Task, graph: Graph) -> float:
    return macs(graph) / macs(task.original)


def macs(graph: Graph) -> int:
    return counts.macs(graph, axes(graph), {})


METHODS = {"multum": ours, "uniform": uniform, "magnitude": theirs("magnitude"), "taylor": theirs("taylor")}


class Still:
    """The training images of a task as they are, in a new order in every pass."""

    def __init__(self, data: Any, seed: int):
        self.data, self.random = data, torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(self.data.images), generator=self.random).split(self.data.size)[: len(self)]:
            yield self.data.images[rows], self.data.labels[rows]


class Shift(Companion):
    """The network sees each batch moved by up to a pixel, while the original sees it as it is: it answers for each image once."""

    key = "shift"

    def view(self, inputs: Tensor) -> Tensor:
        padded = nn.functional.pad(inputs, (1, 1, 1, 1), value=float(inputs.min()))
        places = torch.randint(0, 3, (2, len(inputs), 1)) + torch.arange(inputs.shape[-1])
        return padded[torch.arange(len(inputs))[:, None, None], :, places[0][:, :, None], places[1][:, None, :]].permute(0, 3, 1, 2)


def fine_tune(graph: Graph, task: multum.Task, recipe: str, epochs: float, workdir: Path) -> None:
    if recipe == "near":
        recover(graph, task, Training(epochs=epochs, patience=0), workdir)
    else:
        how = Training(epochs=epochs, patience=0, optimizer="sgd", learning_rate=default_rate(graph, "sgd"))
        recover(graph, replace(task, train=Still(task.train, task.seed)), how, workdir, [Shift()])


def measure(method: str, share: float, seed: int, epochs: float, recipe: str) -> dict[str, object]:
    task = replace(multum.load_task(ROOT / "examples/fashion_mnist/task.py"), seed=seed)
    task.train.random.manual_seed(seed)  # the order of the images, and how they are shifted
    torch.manual_seed(seed)
    begin = time.perf_counter()
    graph = METHODS[method](task, share, seed)
    pruned = time.perf_counter() - begin
    before = float(task.score(graph, "test").mean())
    workdir = LINES.with_suffix("") / f"{method} {share:.3f} {recipe} {epochs:g} {seed}"
    fine_tune(graph.requires_grad_(True), task, recipe, epochs, workdir)
    lost = compare(task.score(task.original, "test"), task.score(graph, "test"))
    return {
        "method": method,
        "asked": share,
        "macs": left(task, graph),
        "parameters": counts.parameters(graph, axes(graph), {}),
        "seed": seed,
        "epochs": epochs,
        "recipe": recipe,
        "validation": float(task.score(graph, "validation").mean()),
        "untrained": before,
        "test": float(task.score(graph, "test").mean()),
        "drop": lost.points,
        "bound": lost.bound,
        "seconds": pruned,
    }


def table() -> None:
    rows = [json.loads(line) for line in LINES.read_text().splitlines()]
    groups: dict[tuple[float, float, str, str], list[dict[str, float]]] = {}
    for row in rows:
        groups.setdefault((row["asked"], row["epochs"], row["recipe"], row["method"]), []).append(row)
    print("| method | MACs | parameters | passes | not trained | trained, test | drop, mean of seeds |\n|---|---|---|---|---|---|---|")
    for (_, epochs, recipe, method), found in sorted(groups.items()):
        drops = [row["drop"] for row in found]
        scores, first = ", ".join(f"{row['test']:.2f}" for row in found), found[0]
        row = f"| {method} | {1 / first['macs']:.2f}x fewer | {first['parameters']:,} | {epochs:g} {recipe} | {first['untrained']:.2f} "
        print(f"{row}| {scores} | {sum(drops) / len(drops):.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="+", choices=[*METHODS, "table"])
    parser.add_argument("--macs", type=float, default=1 / 2.57, help="share of the multiply-accumulates to keep")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--recipe", choices=["near", "away"], default="near")
    given = parser.parse_args()
    LINES.parent.mkdir(parents=True, exist_ok=True)
    for method in given.what:
        for seed in given.seeds if method != "table" else ():
            row = measure(method, given.macs, seed, given.epochs, given.recipe)
            print(row, flush=True)
            with LINES.open("a") as file:
                file.write(json.dumps(row) + "\n")
    table()


if __name__ == "__main__":
    main()
