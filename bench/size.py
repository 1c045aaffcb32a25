"""How small networks get: `python bench/size.py lenet vgg resnet20 reuters`. Rows of RESULTS.md, "Size".

Each recipe is carried out and measured as `multum run` does: the size is that of the one `.mip` file, the score that of the deployed ONNX
file on the test images, the bound that of the paired drop with 95 % confidence.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import networks
import torch

import multum

ROOT = Path(__file__).parents[1]
OUT = ROOT / "out" / "bench" / "size"
LINES = OUT / "rows.jsonl"


def coded(
    bits: float,
    epochs: float,
    learning_rate: float,
    parameters: float,
    recovery: float,
    far: float,
    start: float = 1.3,
    teacher: str = "",
) -> list[multum.Step]:
    """A share of the parameters, which recovers by SGD at `far`; then onto a grid at `start` bits, and down to `bits` while it learns."""
    cut = multum.prune.Channels(parameters=parameters, multiple=1, floor=0.01)
    recover = multum.distill.Logits(epochs=recovery, optimizer="sgd", learning_rate=far, patience=0)
    how = {"bits": bits, "epochs": epochs, "learning_rate": learning_rate, "patience": 0}
    learn = multum.distill.Teachers(files=teacher, weights=(0.3, 0.7), **how) if teacher else multum.distill.Logits(**how)
    return [cut, recover, multum.quantize.RateDistortion(bits=max(bits, start), rounding="nearest"), learn, multum.quantize.Half()]


RECIPES = {
    "lenet": {"parameters": 0.2, "recovery": 18.0, "far": 0.03, "bits": 1.02, "epochs": 14.0, "learning_rate": 1.3e-3},
    "vgg": {"parameters": 0.2, "recovery": 5.0, "far": 0.05, "bits": 2.4, "epochs": 3.0, "learning_rate": 1e-3},
    "resnet20": {"parameters": 0.3, "recovery": 8.0, "far": 0.05, "bits": 1.8, "epochs": 6.0, "learning_rate": 2e-3},
    "reuters": {"parameters": 1 / 3, "bits": 2.0},
}


def shallow(bits: float, parameters: float) -> list[multum.Step]:
    """Of MiniLM half of the branches, and a share of the heads and neurons of the others; the table goes onto its grid before the one
    pass of distillation, which holds its bits, and the rest after it, half a bit finer."""
    cut = [multum.prune.Blocks(ratio=0.5), multum.prune.Heads(ratio=1 - parameters), multum.prune.Neurons(ratio=1 - parameters)]
    table = multum.quantize.RateDistortion(bits=bits, edges=5, rounding="nearest", include="*embeddings*")
    learn = multum.distill.Logits(bits=bits)
    return [*cut, table, learn, multum.quantize.RateDistortion(bits=bits + 0.5), multum.quantize.Half()]


def measure(name: str, seed: int, steps: list[multum.Step], size: str | None) -> dict[str, object]:
    task = multum.load_task(ROOT / "examples/reuters/task.py") if name == "reuters" else networks.task(name, seed)
    if size:
        result = multum.search(task, multum.Target(size=size, max_drop=1.0), OUT / f"{name}_{seed}_searched", tell=print).data
    else:
        result = multum.run(task, multum.Recipe(steps), OUT / f"{name}_{seed}", tell=print).data
    drop, ratios = result["drop"], result["ratios"]
    return {
        "network": name,
        "seed": seed,
        "recipe": result["recipe"],
        "bytes": result["compressed"]["bytes"],
        "smaller": ratios["size"],
        "before": result["original"]["score"],
        "after": result["compressed"]["score"],
        "drop": drop["points"],
        "bound": drop["bound"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    for option in ("parameters", "recovery", "far", "bits", "epochs", "learning_rate"):
        parser.add_argument(f"--{option}", type=float, help="in place of the recipe's")
    parser.add_argument("--start", type=float, help="bits of the grid at first, 1.3 when not given; training goes down from there")
    parser.add_argument("--size", help="such as 1/50: what `multum compress --size 1/50 --max-drop 1` finds, in place of a recipe")
    parser.add_argument("--teacher", help="a .mip file: a second teacher while weights are on their grid, of weight 0.7")
    given = parser.parse_args()
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    for name in given.names:
        for seed in given.seeds:
            chosen = {key: value if getattr(given, key) is None else getattr(given, key) for key, value in RECIPES[name].items()}
            if given.start:
                chosen["start"] = given.start
            if given.teacher:
                chosen["teacher"] = given.teacher
            row = measure(name, seed, (shallow if name == "reuters" else coded)(**chosen), given.size)
            print(json.dumps(row), flush=True)
            with LINES.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
