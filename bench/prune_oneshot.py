"""Pruning in one shot, without training: `python bench/prune_oneshot.py [fashion] [photos] [2]`, after `make models`.

Half of the weights, and a fifth of the channels, with the default options: at most 512 calibration samples, at most a minute. Scores are of
the graph in PyTorch; the size is that of the .mip file against the fp32 ONNX file. A number stands for so many of the steps.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import multum
from multum.analyze.statistics import agreement
from multum.export import to_onnx_bytes
from multum.prune import Blocks, Channels, Weights
from multum.task import call, logits

ROOT = Path(__file__).parents[1]
STEPS = (Weights(ratio=0.5), Channels(ratio=0.2), Channels(ratio=0.2, multiple=1), Blocks(ratio=0.2))
RANDOM = Weights(ratio=0.9, criterion="random", recover=False)


def fashion(count: int) -> None:
    measure(multum.load_task(ROOT / "examples/fashion_mnist/task.py"), count)


def photos(count: int) -> None:
    sys.path.insert(0, str(ROOT / "examples/imagenet_photos"))
    from task import agreement_data, task

    measure(task(), count, agreement_data())


def measure(task: multum.Task, count: int, photos: multum.task.Batches | None = None) -> None:
    before, kept = score(task, task.original), [(data, outputs(task.original, data)) for data in ((photos, task.test) if photos else ())]
    print(f"{task.name}: {before:.2f}", flush=True)
    for step in STEPS[:count]:
        start = time.process_time()
        result = multum.compress(task, step)
        seconds, after, (record,) = time.process_time() - start, score(task, result.graph), result.records
        whole, left = record.parameters
        row = f"  {step}: {before:.2f} -> {after:.2f}, drop {before - after:.2f}; {left:,} of {whole:,} parameters"
        widths = [(len(change["keep"]), change["of"]) for change in record.changes.values() if "keep" in change]
        if widths:
            row += f", {1 - sum(kept for kept, _ in widths) / sum(of for _, of in widths):.1%} of the channels of {len(widths)} groups off"
        row += f"; {seconds:.0f} s of one core"
        for data, wanted in kept:
            same = agreement(wanted, outputs(result.graph, data))
            row += f"; agreement {same:.1f} % of {'all photos' if data is photos else 'those that are scored'}"
        print(row, result.records[0].measured, flush=True)
    if count < len(STEPS):
        return
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "random.mip")
        multum.save(multum.compress(task, RANDOM), path, task)
        size, whole = path.stat().st_size, len(to_onnx_bytes(task.original))
    print(f"  {RANDOM}: {size:,} of {whole:,} bytes, {size / whole:.3f}x", flush=True)


def score(task: multum.Task, graph: multum.Graph) -> float:
    return float(np.mean(task.score(lambda inputs: call(graph, inputs), "test")))


@torch.no_grad()
def outputs(graph: multum.Graph, data: multum.task.Batches) -> torch.Tensor:
    """The logits [samples, classes]."""
    return torch.cat([logits(call(graph, inputs)) for inputs, _ in data])


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = sys.argv[1:]
    count = next((int(word) for word in given if word.isdigit()), len(STEPS))
    for name in [word for word in given if not word.isdigit()] or ("fashion", "photos"):
        {"fashion": fashion, "photos": photos}[name](count)
