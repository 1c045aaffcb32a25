"""What cut channels gain in time, exported: `python bench/prune_speed.py`. Needs a machine that does nothing else.

ResNet-18 at 224x224 with half of all channels cut, against itself, batch 1, on every engine that is installed; widths are multiples
of 16, as the engines like them. Prints how much of the ratio of multiply-accumulates is found again in the times.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import transformers

import multum
from multum.graph.axes import axes
from multum.prune import Channels, counts
from multum.runtime import bench
from multum.runtime.engines import installed


def network() -> multum.Task:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], num_labels=1000)
    model = transformers.ResNetForImageClassification(config).eval()
    return multum.Task(model, {"pixel_values": torch.randn(2, 3, 224, 224)}, name="ResNet-18")


def main() -> None:
    task = network()
    pruned = multum.compress(task, Channels(ratio=0.5, multiple=16)).graph
    macs = [counts.macs(graph, axes(graph), {}) for graph in (task.original, pruned)]
    print(f"multiply-accumulates: {macs[0] / 2e9:.2f} G -> {macs[1] / 2e9:.2f} G, {macs[0] / macs[1]:.2f}x fewer")
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.onnx" for name in ("whole", "half")}
        for graph, path in zip((task.original, pruned), files.values(), strict=True):
            multum.export(graph, path)
        for engine in installed():
            for threads in (1, 2):
                sessions = {name: multum.Session(path, engine=engine, threads=threads, spin=False) for name, path in files.items()}
                example = {"pixel_values": torch.randn(1, 3, 224, 224)}
                measured = bench(sessions, example, batches=(1,), threads=(threads,))
                whole, half = (measured.timing(name, 1, threads) for name in files)
                if whole is None or half is None:
                    print(f"{engine}, {threads} threads: {measured.skipped}")
                    continue
                ratio = whole.median / half.median
                share = ratio / (macs[0] / macs[1])
                print(f"{engine}, {threads} threads: {whole.median:.2f} -> {half.median:.2f} ms, {ratio:.2f}x, {share:.0%} of the ratio")


if __name__ == "__main__":
    main()
