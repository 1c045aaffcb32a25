"""What a sparse execution format does to time: `python bench/sparse.py`, one thread, at batch 1 and 64.

A linear layer whose weights are zero at random, in blocks of 32 by 32, or in whole columns, is run in turns, the median of each counts:
by ONNX Runtime from its dense ONNX file, which is what an export gives; by torch as dense, as CSR, and in blocks (BSR). All give the
same outputs. Zero columns are what pruning of channels makes, so that these also run as the smaller dense layer.
"""

from __future__ import annotations

import itertools
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

BLOCK, ROUNDS, LEAST = 32, 25, 2e-3  # LEAST: seconds that are timed at once


def weights(size: int, zeros: float, pattern: str, random: torch.Generator) -> torch.Tensor:
    value = torch.randn(size, size, generator=random)
    shape = {"single": (size, size), "blocks": (size // BLOCK, size // BLOCK), "columns": (1, size)}[pattern]
    order = torch.rand(shape, generator=random)
    kept = order > order.flatten().kthvalue(round(zeros * order.numel())).values
    if pattern == "blocks":
        kept = kept.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return value * kept


def session(value: torch.Tensor) -> Callable[[np.ndarray], np.ndarray]:
    """The dense ONNX file of x W^T, in ONNX Runtime."""
    rows, columns = value.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", rows])],
        [numpy_helper.from_array(value.T.contiguous().numpy(), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    made = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: made.run(None, {"x": x})[0]


def ways(value: torch.Tensor, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """What is timed, checked once."""
    run, given, columns = session(value), x.numpy(), x.T.contiguous()
    csr, bsr = value.to_sparse_csr(), value.to_sparse_bsr((BLOCK, BLOCK))
    left = value.abs().sum(0) > 0
    small, part = session(value[:, left].contiguous()), x[:, left].contiguous().numpy()
    made: dict[str, Callable[[], object]] = {
        "ONNX Runtime": lambda: run(given),
        "torch": lambda: value @ columns,
        "CSR": lambda: csr @ columns,
        "BSR": lambda: bsr @ columns,
    }
    if float(left.float().mean()) < 1:
        made["cut"] = lambda: small(part)
    for name, way in made.items():
        found = torch.as_tensor(way())
        assert torch.allclose(found if name in ("ONNX Runtime", "cut") else found.T, x @ value.T, atol=1e-2), name
    return made


def timed(made: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each, in turns."""
    counts, found = {}, {name: list[float]() for name in made}
    for name, way in made.items():
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < LEAST:
            way()
            count += 1
        counts[name] = count
    for _ in range(ROUNDS):
        for name, way in made.items():
            begin = time.perf_counter()
            for _ in range(counts[name]):
                way()
            found[name].append((time.perf_counter() - begin) / counts[name])
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    warnings.filterwarnings("ignore", message=".*beta state.*")
    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(0)
    print("| layer, batch | zeros | dense ONNX file, ms | torch | CSR | BSR | cut to what is left |\n" + "|---" * 7 + "|")
    for size, batch in itertools.product((512, 2048), (1, 64)):
        for pattern, zeros in itertools.product(("single", "blocks", "columns"), (0.5, 0.9, 0.99)):
            if pattern != "single" and zeros == 0.99 and size == 512:
                continue
            value, x = weights(size, zeros, pattern, random), torch.randn(batch, size, generator=random)
            times = timed(ways(value, x))
            base = times.pop("ONNX Runtime")
            cells = [f"{base / times[name]:.2f}x" if name in times else "" for name in ("torch", "CSR", "BSR", "cut")]
            print(f"| {size}, {batch} | {zeros:.0%}, {pattern} | {1e3 * base:.3f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
