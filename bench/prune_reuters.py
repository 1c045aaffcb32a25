"""MiniLM on Reuters R8, structured pruning and distillation: `python bench/prune_reuters.py [row ...]`, after `make models`.

Every row is a recipe; without arguments all are run. Printed: the encoder's parameters (embeddings not counted), the score of the deployed
fp32 file on the test documents, and its time at batch 1 on one thread, in turns with the original's. A row that was trained before is
only measured: its file is in out/bench/prune_reuters.
`fine-tuned` rows are no compression: what a pass over the training texts, with labels alone or with the recipe of the others, does for the
original itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

import multum
from multum.distill import Logits
from multum.export import to_onnx_bytes
from multum.prune import Blocks, Heads, Neurons
from multum.runtime.benchmark import bench, verdict

ROOT = Path(__file__).parents[1]
OUT = ROOT / "out" / "bench" / "prune_reuters"
ROWS = {
    "one-shot": [Heads(ratio=0.25), Neurons(ratio=0.5)],
    "2x": [Heads(), Neurons(ratio=0.625), Logits()],
    "2x half a pass": [Heads(), Neurons(ratio=0.625), Logits(epochs=0.5)],
    "3x": [Heads(), Neurons(ratio=0.75), Logits()],
    "4x": [Blocks(ratio=0.5), Heads(), Neurons(), Logits()],
    "6x": [Blocks(ratio=0.5), Heads(ratio=2 / 3), Neurons(ratio=2 / 3), Logits()],
    "10x": [Blocks(ratio=0.5), Heads(ratio=0.8), Neurons(ratio=0.8), Logits()],
    "fine-tuned, labels": [Logits(alpha=0.0)],
    "fine-tuned": [Logits()],
}


def main(names: list[str]) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    task = multum.load_task(ROOT / "examples/reuters/task.py")
    original = OUT / "original.onnx"
    original.write_bytes(to_onnx_bytes(task.original))
    print(f"original: {encoder(task.original):,} parameters in the encoder, {score(task, original):.2f}", flush=True)
    for name in names:
        path = OUT / f"{name.replace(' ', '_')}.onnx"
        if not path.is_file():
            graph = multum.compress(task, ROWS[name], workdir=OUT / path.stem).graph
            ratio = encoder(task.original) / encoder(graph)
            print(f"{name}: {encoder(graph):,} parameters in the encoder, {ratio:.1f}x fewer", flush=True)
            path.write_bytes(to_onnx_bytes(graph))
        print(f"{name}: {score(task, path):.2f}", flush=True)
        for engine in ("onnxruntime", "openvino"):
            files = {which: multum.Session(file, engine=engine) for which, file in (("model", path), ("original", original))}
            told = verdict(bench(files, task.example, batches=(1,), threads=(1,)), "model", "original")
            print(f"  {engine}: {told.reason}", flush=True)


def encoder(graph: multum.Graph) -> int:
    return sum(parameter.numel() for name, parameter in graph.tensors.named_parameters() if ".layer." in name)


def score(task: multum.Task, path: Path) -> float:
    return float(np.mean(task.score(multum.Session(path, engine="onnxruntime", threads=1).predict, "test")))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:] or list(ROWS))
