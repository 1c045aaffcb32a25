"""The figures of the main job, measured: `python bench/main_job.py fashion reuters photos`, after `make models`.

Writes everything under out/bench/ and prints one row for each example. Needs a machine that does nothing else.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import multum
from multum.analyze.statistics import agreement
from multum.task import logits

ROOT = Path(__file__).parents[1]
OUT = ROOT / "out" / "bench"


def fashion() -> None:
    task = multum.load_task(ROOT / "examples/fashion_mnist/task.py")
    row("Fashion-MNIST", multum.search(task, multum.Target(size="1/24", max_drop=0.5), OUT / "fashion", tell=tell).data)


def reuters() -> None:
    task = multum.load_task(ROOT / "examples/reuters/task.py")
    row("Reuters", multum.run(task, multum.Recipe.load(ROOT / "bench/recipes/reuters.yaml"), OUT / "reuters", tell=tell).data)


def photos() -> None:
    sys.path.insert(0, str(ROOT / "examples/imagenet_photos"))
    from task import agreement_data, task

    job = task()
    row("photos", multum.run(job, multum.Recipe.load(ROOT / "bench/recipes/photos.yaml"), OUT / "photos", tell=tell).data)
    for what, data in (("all photos", agreement_data()), ("the photos that are scored", job.test)):
        before, after = (outputs(OUT / "photos" / f"{name}.onnx", data) for name in ("original", "model"))
        print(f"photos: agreement {agreement(before, after):.1f} % of {len(before)}, {what}")


def outputs(path: Path, data: multum.task.Batches) -> torch.Tensor:
    """The logits [samples, classes] of a deployed file."""
    session = multum.Session(path, engine="onnxruntime")
    return torch.cat([logits(session.predict(x)) for x, _ in data])


def row(name: str, result: dict) -> None:
    ratios, drop = result["ratios"], result["drop"]
    speed = ratios["speed"]
    print(
        f"{name}: {result['compressed']['bytes']:,} of {result['original']['bytes']:,} bytes, {ratios['size']:.1f}x smaller; "
        f"score {result['original']['score']:.2f} -> {result['compressed']['score']:.2f}, "
        f"drop {drop['points']:.2f}, at most {drop['bound']:.2f}; "
        f"speed {json.dumps(speed)}; {result['verdict']}",
        flush=True,
    )


def tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or ("fashion", "reuters", "photos"):
        {"fashion": fashion, "reuters": reuters, "photos": photos}[name]()
