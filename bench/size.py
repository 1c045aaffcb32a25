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


def coded(bits: float, epochs: float, learning_rate: float, start: float = 1.3) -> list[multum.Step]:
    """Onto a grid at `start` bits, and down to `bits` while it learns."""
    learn = multum.distill.Logits(bits=bits, epochs=epochs, learning_rate=learning_rate, patience=0)
    return [multum.quantize.RateDistortion(bits=start, rounding="nearest"), learn, multum.quantize.Half()]


RECIPES = {
    "lenet": {"bits": 0.1, "epochs": 5.0, "learning_rate": 2e-3},
    "vgg": {"bits": 0.4, "epochs": 4.0, "learning_rate": 2e-3},
    "resnet20": {"bits": 0.64, "epochs": 2.0, "learning_rate": 2e-3},
}


def measure(name: str, seed: int, steps: list[multum.Step]) -> dict[str, object]:
    out = OUT / f"{name}_{seed}"
    result = multum.run(networks.task(name, seed), multum.Recipe(steps), out, tell=print).data
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
    for option in ("bits", "epochs", "learning_rate"):
        parser.add_argument(f"--{option}", type=float, help="in place of the recipe's")
    given = parser.parse_args()
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    for name in given.names:
        for seed in given.seeds:
            chosen = {key: value if getattr(given, key) is None else getattr(given, key) for key, value in RECIPES[name].items()}
            row = measure(name, seed, coded(**chosen))
            print(json.dumps(row), flush=True)
            with LINES.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
