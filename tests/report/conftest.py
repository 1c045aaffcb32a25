"""A small, complete result, as a search leaves it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LAYERS = [
    {
        "name": f"blocks.{index}.conv",
        "kind": "conv",
        "before": {"parameters": 1000 * index, "macs": 49_000 * index, "bytes": 4000 * index, "ms": 0.01},
        "after": {"parameters": 250 * index, "macs": 12_000 * index, "bytes": 125 * index, "ms": 0.004},
    }
    for index in (1, 2, 4)
]
RECORD = {
    "step": "prune.Channels",
    "options": {"ratio": 0.5},
    "changes": {"blocks.1.conv": {"keep": [0], "of": 2}},
    "skipped": {"head": "its outputs are the model's", "stem": "its outputs are the model's"},
    "parameters": [272186, 69000],
    "seconds": 1.2,
    "measured": {"best": 92.7},
}
ENGINES = {"baseline": "onnxruntime", "engine": "openvino"}
RESULT: dict[str, Any] = {
    "result": 1,
    "multum": "0.1.0",
    "created": "2026-01-01T00:00:00Z",
    "name": "toy",
    "met": True,
    "missed": {},
    "binding": None,
    "stopped": None,
    "target": {"size": "1/20", "max_drop": 0.5},
    "limit": 50_000,
    "higher_is_better": True,
    "steered_by": "validation",
    "original": {"bytes": 1_000_000, "parameters": 272186, "macs": 343_000, "score": 92.75, "latency": {"median": 0.3}},
    "compressed": {"bytes": 40_000, "parameters": 69000, "macs": 84_000, "score": 92.5, "latency": {"median": 0.15}},
    "ratios": {"size": 25.0, "speed": {"ratio": 2.0, "low": 1.9, "high": 2.1, "baseline": "onnxruntime"}},
    "drop": {"points": 0.25, "bound": 0.4, "p": 0.031, "n": 10000, "discordant": 150, "part": "test"},
    "verdict": "faster: 2.00x (1.90 to 2.10) the speed of original on onnxruntime at batch 1 on 2 threads",
    "bench": [
        ENGINES | {"batch": 1, "threads": 2, "original": 0.3, "compressed": 0.15, "ratio": 2.0, "low": 1.9, "high": 2.1},
        ENGINES | {"batch": 32, "threads": 2, "original": 9.0, "compressed": 3.0, "ratio": 3.0, "low": None, "high": None},
    ],
    "recipe": [{"prune.Channels": {"ratio": 0.5}}, "quantize.Static"],
    "records": [RECORD],
    "layers": LAYERS,
    "candidates": 3,
    "files": {"model": "model.mip", "onnx": "model.onnx", "recipe": "recipe.yaml"},
    "machine": {"processor": "a processor", "cpus": 2},
}  # fmt: skip
CANDIDATES = [
    {"name": "original", "bytes": 1_000_000, "score": 92.8, "latency": 0.3, "speed": 1.0, "seconds": 1, "recipe": []},
    {"name": "gentle", "bytes": 250_000, "score": 92.8, "latency": 0.2, "speed": 1.5, "seconds": 1, "recipe": []},
    {"name": "strong", "bytes": 40_000, "score": 92.4, "latency": 0.15, "speed": 2.0, "seconds": 9, "recipe": [], "chosen": True},
    {"name": "only built", "bytes": 30_000, "score": None, "latency": None, "speed": None, "seconds": 1, "recipe": []},
    {"name": "broken", "recipe": [], "error": "the loss is NaN at step 12"},
]


@pytest.fixture
def result() -> dict[str, Any]:
    return json.loads(json.dumps(RESULT))


@pytest.fixture
def candidates() -> list[dict[str, Any]]:
    return json.loads(json.dumps(CANDIDATES))


@pytest.fixture
def written(tmp_path: Path, candidates: list[dict[str, Any]]) -> Callable[[dict[str, Any]], Path]:
    """Writes a result into a folder, and returns the folder."""

    def write(result: dict[str, Any]) -> Path:
        (tmp_path / "result.json").write_text(json.dumps(result))
        (tmp_path / "candidates.json").write_text(json.dumps({"candidates": candidates}))
        return tmp_path

    return write
