"""Factorized networks: `python bench/factorize.py resnet recovered photos minilm embeddings ranks layers`, after `make models`.

`resnet`, `recovered` (with training), `photos` and `minilm` halve the multiply-accumulates of a network; scores are of the ONNX file in
ONNX Runtime. `embeddings` makes the table of MiniLM at least four times smaller. `ranks` compares chosen ranks with all of a grid. `layers`
times single layers and the chains in their place, in turn; it needs a machine that does nothing else. Lines go to
out/bench/factorize/runs.jsonl.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

import multum
from multum.analyze.latency import chains
from multum.analyze.statistics import agreement
from multum.distill import Logits
from multum.factorize import CP, SVD, Spatial, TensorTrain, Tucker
from multum.factorize.given import Given
from multum.factorize.timing import Clock
from multum.graph import Graph, layers
from multum.graph.axes import axes
from multum.prune import counts
from multum.quantize import WeightOnly
from multum.step import Step
from multum.task import call, logits

ROOT = Path(__file__).parents[1]
OUT = ROOT / "out" / "bench" / "factorize"


def tell(what: str, **figures: object) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"what": what, **figures})
    print(line, flush=True)
    with (OUT / "runs.jsonl").open("a") as file:
        file.write(line + "\n")


def macs(graph: Graph) -> int:
    return counts.macs(graph, axes(graph), {})


def deployed(graph: Graph, name: str) -> multum.Session:
    path = OUT / f"{name}.onnx"
    OUT.mkdir(parents=True, exist_ok=True)
    multum.export(graph, path)
    return multum.Session(path, engine="onnxruntime", threads=1)


def example(name: str) -> multum.Task:
    return multum.load_task(ROOT / f"examples/{name}/task.py")


def scored(task: multum.Task, steps: Sequence[Step], name: str, before: float) -> Graph:
    clock = time.process_time()
    result = multum.compress(task, steps)
    seconds = time.process_time() - clock
    after = float(task.score(deployed(result.graph, name).predict, "test").mean())
    ratio = macs(task.original) / macs(result.graph)
    sizes = [sum(p.numel() for p in graph.parameters()) for graph in (task.original, result.graph)]
    steps_ = " > ".join(map(str, steps))
    tell(name, steps=steps_, macs=round(ratio, 3), parameters=sizes, score=after, drop=round(before - after, 2), seconds=round(seconds))
    return result.graph


def resnet() -> None:
    task = example("fashion_mnist")
    before = float(task.score(partial(call, task.original), "test").mean())
    tell("resnet", score=before)
    for step in (SVD, Spatial, Tucker, CP):
        for options in ({}, {"loss": "outputs", "weighting": "outputs"}):
            for recover in (True, False) if step is not CP or not options else ():
                scored(task, [step(macs=0.48, recover=recover, **options)], f"resnet {step.name()}", before)


def recovered(names: Sequence[str] = ("Spatial", "Tucker")) -> None:
    task = example("fashion_mnist")
    before = float(task.score(partial(call, task.original), "test").mean())
    for name in names:
        step = {"Tucker": Tucker, "Spatial": Spatial, "SVD": SVD, "CP": CP}[name](macs=0.48, loss="outputs", weighting="outputs")
        scored(task, [step, Logits(epochs=2.0)], f"resnet {name}, 2 passes", before)


def photos() -> None:
    """Agreement on all photos, and on those that are scored: the others stand in for calibration and training data in the last rows.

    The row before tells what other data would be worth: it is calibrated with all photos, those that are scored as well.
    """
    sys.path.insert(0, str(ROOT / "examples/imagenet_photos"))
    from data import Batches, rows
    from task import CALIBRATION, task

    job, sets = task(), rows()[1]
    before = float(job.score(partial(call, job.original), "test").mean())
    others = [row for row in sets["photos"] if row not in set(sets["labelled"])]
    seen = job.but(train=Batches(others, 16, shuffle=True), calibration=Batches(others[:CALIBRATION], 16))
    best = {"loss": "outputs", "weighting": "outputs"}
    same = job.but(calibration=Batches(sets["photos"], 16))
    names = {id(job): "drawings", id(seen): "other photos", id(same): "all photos"}
    plain = best | {"recover": False}
    drawn = [(job, share, options, 0.0) for share, options in ((0.45, best), (0.45, plain), (0.6, best), (0.75, best), (0.45, {}))]
    seen_rows = [(seen, 0.45, best, epochs) for epochs in (0.0, 12.0)]
    for own, share, options, epochs in (*drawn, (job, 0.45, best, 4.0), (same, 0.45, best, 0.0), *seen_rows):
        clock = time.process_time()
        recovery = [Logits(epochs=epochs, augment=("crop", "flip"))] if epochs else []
        graph = multum.compress(own, [SVD(macs=share, **options), *recovery], workdir=OUT / f"photos, {names[id(own)]}").graph
        session, found = deployed(graph, "photos"), {"macs": round(macs(job.original) / macs(graph), 3)}
        for name, part in (("all", sets["photos"]), ("scored", sets["labelled"])):
            data = Batches(part, 16)
            with torch.no_grad():
                whole, after = (
                    torch.cat([logits(answer(x)) for x, _ in data]) for answer in (partial(call, job.original), session.predict)
                )
            found[f"agreement, {name}"] = agreement(whole, after)
        found |= {"top1": [before, float(job.score(session.predict, "test").mean())], "seconds": round(time.process_time() - clock)}
        tell("photos", calibrated=names[id(own)], share=share, options=options, passes=epochs, **found)


def minilm() -> None:
    task = example("reuters")
    before = 96.48  # examples/reuters, bench/RESULTS.md
    by_outputs = SVD(macs=0.5, loss="outputs", weighting="outputs", samples=200)
    for name, steps in {
        "by outputs, a pass": [by_outputs, Logits()],
        "by outputs": [by_outputs],
        "by energy": [SVD(macs=0.5, samples=200)],
    }.items():
        scored(task, steps, f"minilm, {name}", before)


def embeddings() -> None:
    task = example("reuters")
    only = {"include": "*word_embeddings"}
    for name, steps in {
        "SVD of rank 94 of the weights alone, 4.0x": [SVD(rank=94, samples=0, **only)],
        "SVD of rank 94 by counts, 4.0x": [SVD(rank=94, samples=200, **only)],
        "SVD of rank 94 by counts and what errors cost, 4.0x": [SVD(rank=94, weighting="outputs", samples=200, **only)],
        "SVD of rank 188 in 8 bits, 8.0x": [
            SVD(rank=188, weighting="outputs", samples=200, **only),
            WeightOnly(bits=8, include="*word_embeddings.factor*"),
        ],
        "TT of 3 cores": [TensorTrain(parameters=0.25, **only)],
    }.items():
        scored(task, steps, f"embeddings, {name}", 96.48)


def ranks() -> None:
    """Ranks of three layers, all of a grid of seven each, and those that are chosen for the cost that the grid needs at equal drop."""
    task = example("fashion_mnist")
    images = [(x, y) for x, y in task.data("validation")][:8]
    names = ("blocks.4.conv2", "blocks.6.conv1", "blocks.7.conv2")
    chosen = {layer.name: layer for layer in layers(task.original) if layer.name in names}
    step = SVD(macs=0.5, include=names, loss="outputs")
    given, graph = Given(task.original, task, 256), task.original.copy()
    with torch.no_grad():
        whole = torch.cat([logits(call(task.original, x)) for x, _ in images])

    def lost(current: Graph) -> float:
        with torch.no_grad():
            seen = torch.cat([logits(call(current, x)) for x, _ in images])
        return float((seen - whole).square().sum() / (whole - whole.mean(0)).square().sum())

    options = {}
    for name, layer in chosen.items():
        curve, weights = step.curve(layer, *given(layer), True), []
        full = int(curve.pays.sum())
        for rank in sorted({max(1, round(full * share)) for share in (0.1, 0.2, 0.3, 0.4, 0.55, 0.7, 0.85)}):
            weights.append((float(curve.costs[rank - 1]), step.dense(layer, *given(layer), [rank]).float()))
        options[name] = weights
    points = []
    for choice in itertools.product(*options.values()):
        for name, (_, weight) in zip(options, choice, strict=True):
            graph.tensor(chosen[name].weight).data.copy_(weight)
        points.append((sum(cost for cost, _ in choice), lost(graph)))
    total = sum(step.curve(layer, *given(layer), True).whole for layer in chosen.values())
    for share in (0.2, 0.3, 0.4, 0.5, 0.6):
        for loss in ("energy", "outputs"):
            result = multum.compress(task, SVD(macs=share, include=names, loss=loss, recover=False))
            spent = total + sum(change["macs"][1] - change["macs"][0] for change in result.records[0].changes.values())
            off = lost(result.graph)
            best = min((cost for cost, other in points if other <= off), default=float("nan"))
            tell(
                "ranks", share=share, loss=loss, lost=round(off, 5), cost=spent / total, grid=best / total, over=round(spent / best - 1, 4)
            )


def layers_() -> None:
    """Times of layers of 64 channels and more, and of chains with half of their multiply-accumulates."""
    shapes = [(0, 384, 1536), (0, 768, 768), (96, 28, 1), (384, 14, 1), (512, 7, 3), (256, 14, 3), (128, 28, 3), (64, 56, 3)]
    for channels, size, last in shapes:
        torch.manual_seed(0)
        if channels:
            module, x = torch.nn.Conv2d(channels, channels, last, padding=last // 2), torch.randn(2, channels, size, size)
        else:
            module, x = torch.nn.Linear(size, last), torch.randn(2, 128, size)
        task = multum.Task(torch.nn.Sequential(module).eval(), x)
        layer = layers(task.original)[0]
        for step in (SVD, Spatial, Tucker, CP, TensorTrain):
            method = step(macs=0.5)
            if step is CP and channels > 128:
                continue  # the curve of its ranks takes minutes
            if layer.kind not in step.kinds or method.reason(task.original, layer):
                continue
            curve = method.curve(layer, Given(task.original, task, 0).plain(layer), None, True)
            best = int(torch.where(curve.costs <= 0.5 * curve.whole, curve.costs, 0).argmax())
            clock = Clock(task.original, layer, partial(method._sketch, module.weight.detach().double(), layer))
            pairs = []
            for _ in range(5):
                chains.cache_clear()
                pairs.append(clock.times(curve.rank(best)))
            own, chain = (sorted(times)[2] for times in zip(*pairs, strict=True))
            ratio = curve.whole / float(curve.costs[best])
            speed = own / chain
            where = f"{channels or size}x{channels or last}, {last}x{last} at {size}" if channels else f"{size}x{last}, 128 rows"
            tell("layers", layer=where, step=step.name(), rank=curve.rank(best), macs=round(ratio, 2), ms=[round(own, 4), round(chain, 4)],
                 speed=round(speed, 2), share=round(speed / ratio, 2))  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    known = {
        "resnet": resnet,
        "recovered": recovered,
        "photos": photos,
        "minilm": minilm,
        "embeddings": embeddings,
        "ranks": ranks,
        "layers": layers_,
    }
    for name in sys.argv[1:] or known:
        known[name]()
