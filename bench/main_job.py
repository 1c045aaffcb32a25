"""The figures of the main job, measured: `python bench/main_job.py fashion reuters photos`, after `make models`.

Writes everything under out/bench/ and prints one row for each example. Needs a machine that does nothing else.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import multum
from multum.analyze.statistics import agreement
from multum.task import logits

ROOT = Path(__file__).parents[1]
OUT = ROOT / "out" / "bench"


def fashion() -> None:
    task = multum.load_task(ROOT / "examples/fashion_mnist/task.py")
    target = multum.Target(size="1/24", max_drop=0.5, minutes=4)
    finish("fashion_mnist", task, multum.search(task, target, OUT / "fashion_mnist", tell=tell).data)


def reuters() -> None:
    task = multum.load_task(ROOT / "examples/reuters/task.py")
    recipe = multum.Recipe.load(ROOT / "bench/recipes/reuters.yaml")
    finish("reuters", task, multum.run(task, recipe, OUT / "reuters", tell=tell).data)


def photos() -> None:
    sys.path.insert(0, str(ROOT / "examples/imagenet_photos"))
    from task import agreement_data, task

    job = task()
    recipe = multum.Recipe.load(ROOT / "bench/recipes/photos.yaml")
    finish("imagenet_photos", job, multum.run(job, recipe, OUT / "imagenet_photos", tell=tell).data)
    for what, data in (("all photos", agreement_data()), ("the photos that are scored", job.test)):
        before, after = (outputs(OUT / "imagenet_photos" / f"{name}.onnx", data) for name in ("original", "model"))
        print(f"photos: agreement {agreement(before, after):.1f} % of {len(before)}, {what}")


def outputs(path: Path, data: multum.task.Batches) -> torch.Tensor:
    """The logits [samples, classes] of a deployed file."""
    session = multum.Session(path, engine="onnxruntime")
    return torch.cat([logits(session.predict(x)) for x, _ in data])


def finish(name: str, task: multum.Task, result: dict) -> None:
    """Prints the row, keeps the figures, and loads the file where nothing of the example is at hand."""
    ratios, drop = result["ratios"], result["drop"]
    print(
        f"{name}: {result['compressed']['bytes']:,} of {result['original']['bytes']:,} bytes, {ratios['size']:.1f}x smaller; "
        f"score {result['original']['score']:.2f} -> {result['compressed']['score']:.2f}, "
        f"drop {drop['points']:.2f}, at most {drop['bound']:.2f}; {result['verdict']}"
    )
    for one in result["bench"]:
        spread = f"{one['low']:.2f} to {one['high']:.2f} times the speed of {one['baseline']}"
        print(f"  batch {one['batch']}, {one['threads']} threads: {one['ratio']:.2f}x, {spread}")
    kept = ("name", "met", "original", "compressed", "ratios", "drop", "verdict", "bench", "recipe", "machine", "multum")
    record = ROOT / "bench" / "recorded" / f"{name}.json"
    record.parent.mkdir(exist_ok=True)
    record.write_text(json.dumps({key: result[key] for key in kept}, indent=1) + "\n")
    print(f"  in a fresh process: {fresh(OUT / name / 'model.mip', task):.1e} from the graph that was saved")


FRESH = """
import sys, torch, multum
graph = multum.load(sys.argv[1])
inputs = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save(graph(**inputs) if isinstance(inputs, dict) else graph(inputs), sys.argv[3])
"""


def fresh(model: Path, task: multum.Task) -> float:
    """The largest difference between the file's outputs here and in a process that knows nothing of the example."""
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch, "inputs.pt"), Path(scratch, "outputs.pt")
        torch.save(task.example, inputs)
        subprocess.run([sys.executable, "-P", "-c", FRESH, model, inputs, outputs], check=True, cwd=scratch)
        there = torch.load(outputs, weights_only=True)
    with torch.no_grad():
        here = multum.task.call(multum.load(model), task.example)
    return float((logits(here) - logits(there)).abs().max())


def tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or ("fashion", "reuters", "photos"):
        {"fashion": fashion, "reuters": reuters, "photos": photos}[name]()
