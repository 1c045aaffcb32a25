"""Lighter networks, measured: `python bench/lighten.py [replace] [blocks] [scratch] [reparameterize]`, after `make models`.

The network is a VGG of five 3x3 convolutions (32, 64 and 128 channels, strides of 2, no pooling), trained here on Fashion-MNIST and kept
in out/bench/lighten. `replace`: its convolutions become depthwise separable ones. `blocks`: other blocks, without training. `scratch`: the
same architecture begun at random and trained just as long, to tell what the dense weights are worth. Scores are of deployed files on the
test images, times of ONNX Runtime at batch 1 and 32 on one thread, in turns. `reparameterize`: its training form next to what it merges
into, in PyTorch as well.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import multum
from multum.analyze import analyze
from multum.distill import Logits
from multum.export import to_onnx_bytes
from multum.lighten import Merge, Reparameterize, Replace
from multum.runtime.benchmark import bench, verdict

ROOT = Path(__file__).parents[1]
OUT = ROOT / "out" / "bench" / "lighten"
PASSES, RATE = 4, 0.1
SGD = {"epochs": 9.0, "optimizer": "sgd", "learning_rate": 0.1}
REPLACE = {
    "2 passes": [Replace(by="separable", epochs=1.0), Logits(epochs=1.0, learning_rate=2e-3)],
    "10 passes": [Replace(by="separable", epochs=1.0), Logits(**SGD, likeness="correlated", alpha=0.5)],
    "10 passes, labels alone": [Replace(by="separable", epochs=1.0), Logits(**SGD, alpha=0.0)],
    "10 passes, soft labels": [Replace(by="separable", epochs=1.0), Logits(**SGD)],
}


def network() -> nn.Module:
    parts: list[nn.Module] = []
    inputs = 1
    for outputs, stride in ((32, 2), (64, 2), (64, 1), (128, 2), (128, 1)):
        parts += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def task() -> multum.Task:
    """The network, trained when it was not yet, on the data of the example."""
    found = multum.load_task(ROOT / "examples/fashion_mnist/task.py")
    torch.manual_seed(0)
    model, file = network(), OUT / "network.safetensors"
    if file.is_file():
        model.load_state_dict(load_file(file))
    else:
        sys.path.insert(0, str(ROOT / "examples/fashion_mnist"))
        from train import fit

        model.to(memory_format=torch.channels_last)
        fit(model, found.train, PASSES, RATE, 0.2)
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, file)
        model.to(memory_format=torch.contiguous_format)
    model.eval()
    return multum.Task(
        model,
        found.example,
        found.train,
        found.calibration,
        found.validation,
        found.test,
        found.loss,
        found.metric,
        name="VGG on Fashion-MNIST",
    )


def file_of(graph: multum.Graph, name: str) -> Path:
    path = OUT / f"{name}.onnx"
    path.write_bytes(to_onnx_bytes(graph))
    return path


def score(job: multum.Task, path: Path) -> float:
    return float(np.mean(job.score(multum.Session(path, engine="onnxruntime", threads=1).predict, "test")))


def times(job: multum.Task, model: Path, original: Path) -> None:
    files = {name: multum.Session(path, engine="onnxruntime", threads=1) for name, path in (("model", model), ("original", original))}
    for batch in (1, 32):
        print(
            f"  batch {batch}: {verdict(bench(files, job.example, batches=(batch,), threads=(1,)), 'model', 'original').reason}", flush=True
        )


def eager(wide: multum.Graph, merged: multum.Graph, inputs: torch.Tensor) -> None:
    """Processor time in PyTorch, eval mode, in turns: the median of the ratios."""
    for batch in (1, 32):
        ratios = []
        for _ in range(25):
            spent = []
            for graph in (wide, merged):
                with torch.no_grad():
                    graph(inputs[:batch])
                    begin = time.process_time()
                    graph(inputs[:batch])
                    spent.append(time.process_time() - begin)
            ratios.append(spent[0] / spent[1])
        print(f"  batch {batch}, in PyTorch: {np.median(ratios):.2f}x", flush=True)


def replace(job: multum.Task) -> None:
    original = file_of(job.original, "original")
    before = score(job, original)
    for name, steps in REPLACE.items():
        start = time.perf_counter()
        result = multum.compress(job, steps, workdir=OUT / "replace")
        model = file_of(result.graph, "model")
        after = score(job, model)
        counts = [analyze(graph, job.example, latency=False).macs for graph in (job.original, result.graph)]
        print(
            f"replace, {name}: {counts[0]:,} -> {counts[1]:,} MACs, {counts[0] / counts[1]:.2f}x fewer; {before:.2f} -> {after:.2f}, ",
            end="",
        )
        print(f"drop {before - after:.2f}; {time.perf_counter() - start:.0f} s", flush=True)
    one_shot = multum.compress(job, Replace(by="separable"))
    lost = {name: round(change["lost"], 3) for name, change in one_shot.records[0].changes.items()}
    print(f"  without training {score(job, file_of(one_shot.graph, 'one_shot')):.2f}; of each layer's output lost: {lost}", flush=True)
    times(job, model, original)


def blocks(job: multum.Task) -> None:
    """What blocks lose without training, and how much of it they make good."""
    for kind in ("separable", "grouped", "bottleneck", "low_rank", "ghost"):
        made = [multum.compress(job, Replace(by=kind, recover=recover)) for recover in (False, True)]
        scores = [score(job, file_of(result.graph, "block")) for result in made]
        print(f"blocks, {kind}: {scores[0]:.2f}, with recovery {scores[1]:.2f} ({made[1].records[0].measured['recovery']})", flush=True)


def scratch(job: multum.Task) -> None:
    student = multum.compress(job, Replace(by="separable")).graph
    torch.manual_seed(0)
    for parameter in student.tensors.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
    passes = sum(step.epochs for step in REPLACE["10 passes, labels alone"])
    graph = multum.compress(job, Logits(**SGD | {"epochs": passes}, alpha=0.0), student=student, workdir=OUT / "scratch").graph
    print(f"scratch: {score(job, file_of(graph, 'scratch')):.2f} after {passes:g} passes from random weights", flush=True)


def reparameterize(job: multum.Task) -> None:
    """Needs no trained network: equality and time do not depend on what the weights are."""
    for branches in ("repvgg", "acb", "dbb"):
        wide = multum.compress(job, Reparameterize(branches=branches, epochs=0)).graph
        torch.manual_seed(0)
        with torch.no_grad():  # as if trained: branches that say something, and the statistics that go with them
            for name, parameter in wide.tensors.named_parameters():
                if name.endswith("_norm.scale"):
                    parameter.normal_()
            wide.train()
            for inputs, _ in list(job.calibration) * 20:
                wide(inputs)
            wide.eval()
        merged = wide.copy()
        step = Merge()
        step.apply(merged, step.plan(merged, job), job, None)
        inputs = next(iter(job.validation))[0]
        with torch.no_grad():
            a, b = wide(inputs), merged(inputs)
        print(f"{branches}: merged off by {float((a - b).abs().max() / a.abs().max()):.1e} relative", flush=True)
        times(job, file_of(merged, "merged"), file_of(wide, "wide"))
        eager(wide, merged, inputs)


if __name__ == "__main__":
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    ready = task()
    rows = {"replace": replace, "blocks": blocks, "scratch": scratch, "reparameterize": reparameterize}
    for which in sys.argv[1:] or rows:
        rows[which](ready)
