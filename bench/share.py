"""Shared weights, measured: `python bench/share.py [row ...]`, after `make models`.

Every row is a recipe for an example; without arguments all are run. Printed: bytes of the file next to those of the original's ONNX file,
and the score on the test data, both of the deployed files in ONNX Runtime; for rows of embeddings the bytes of the table alone as well.
"""

from __future__ import annotations

import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch

import multum
from multum.distill import Logits
from multum.export import to_onnx_bytes
from multum.quantize import Half
from multum.share import Clusters, Ties

ROOT = Path(__file__).parents[1]
OUT = ROOT / "out" / "bench" / "share"
TABLE = "*word_embeddings*"
ROWS = {
    "16 entries": ("fashion_mnist", [Clusters(entropy=2.6), Logits(epochs=1.0), Half()]),
    "16 entries, no training": ("fashion_mnist", [Clusters(entropy=2.6), Half()]),
    "16 entries, 3.1 bits, no training": ("fashion_mnist", [Clusters(entropy=3.1), Half()]),
    "16 entries, soft": ("fashion_mnist", [Clusters(entropy=2.6, epochs=1.0), Half()]),
    "pairs, soft": ("fashion_mnist", [Clusters(size=2, bits=6, scope="model", entropy=3.2, epochs=2.0), Half()]),
    "pairs": ("fashion_mnist", [Clusters(size=2, bits=6, scope="model", entropy=3.2), Logits(epochs=2.0), Half()]),
    "pairs, no training": ("fashion_mnist", [Clusters(size=2, bits=6, scope="model", entropy=3.2), Half()]),
    "table, pairs, one codebook": ("reuters", [Clusters(size=2, bits=8, include=TABLE)]),
    "table, pairs": ("reuters", [Clusters(size=2, bits=8, scope="channel", include=TABLE)]),
    "table, fours": ("reuters", [Clusters(size=4, bits=8, scope="channel", include=TABLE)]),
    "ties": ("reuters", [Ties(own=False), Logits(epochs=1.0)]),
    "ties, 2 passes": ("reuters", [Ties(own=False), Logits(epochs=2.0, learning_rate=3e-4)]),
}


@cache
def before(name: str) -> tuple[multum.Task, int, float]:
    """The example's task, the bytes of its original and its score."""
    task, path = multum.load_task(ROOT / f"examples/{name}/task.py"), OUT / f"{name}.onnx"
    path.write_bytes(to_onnx_bytes(task.original))
    return task, path.stat().st_size, score(task, path)


def score(task: multum.Task, path: Path) -> float:
    return float(np.mean(task.score(multum.Session(path, engine="onnxruntime", threads=1).predict, "test")))


def coded(graph: multum.Graph, part: str) -> int:
    """Bytes of the tensors whose name has this in it, before entropy coding."""
    return sum(value.numel() * value.element_size() for name, value in graph.named_tensors() if part in name)


def main(names: list[str]) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    for name in names:
        example, recipe = ROWS[name]
        task, size, old = before(example)
        start = time.perf_counter()
        result, path = multum.compress(task, recipe, workdir=OUT / name.replace(" ", "_")), OUT / "model.mip"
        seconds, taken = time.perf_counter() - start, multum.save(result, path, task)
        new = score(task, path)
        told = f"{name}: {taken:,} of {size:,} bytes, {size / taken:.1f}x; {old:.2f} -> {new:.2f}, drop {old - new:.2f}; {seconds:.0f} s"
        if example == "reuters":
            table, layers = (coded(task.original, part) / coded(result.graph, part) for part in ("word_embeddings", ".layer."))
            told += f"; table {table:.1f}x smaller, encoder {layers:.1f}x"
        print(told, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:] or list(ROWS))
