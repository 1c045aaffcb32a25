"""Training with grids in mind on the Fashion-MNIST ResNet-20: weights and activations of few bits, the deployed file scored.

    python bench/aware.py "Aware(weight_bits=2, activation_bits=2, epochs=8)" [...]       # steps of multum.quantize

Scored on the validation images and, once, on the test images; one thread. Work is kept under out/, so that a run that was stopped goes on.
"""

import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import multum
from multum import distill, quantize
from multum.task import call


def main() -> None:
    torch.set_num_threads(1)
    task = multum.load_task("examples/fashion_mnist/task.py")
    for text in sys.argv[1:]:
        start = time.process_time()
        recipe = eval(f"[{text}]", {**vars(quantize), "distill": distill})
        result = multum.compress(task, recipe, workdir=Path("out/bench/aware"))
        took = time.process_time() - start
        print(text, f"{took:.0f} s", [row for record in result.records for row in record.measured.get("validation", [])], flush=True)
        parts = {part: float(np.mean(task.score(partial(call, result.graph), part))) for part in ("validation", "test")}
        with tempfile.TemporaryDirectory() as folder:
            file = multum.export(result.graph, Path(folder) / "made.onnx")
            whole = multum.save(result, Path(folder) / "made.mip", task)
            session = multum.Session(file, engine="onnxruntime", threads=1)
            deployed = float(np.mean(task.score(session.predict, "test")))
            print(f"  graph {parts}; ONNX {deployed:.2f}; {file.stat().st_size:,} bytes, .mip {whole:,}", flush=True)


if __name__ == "__main__":
    main()
