"""How fast int8 files run, batch 1, in turns, on every engine; a quiet machine is needed.

    python bench/int8_speed.py --make [resnet18 minilm]     # writes the files under out/bench/int8_speed, those that are not there
    python bench/int8_speed.py [resnet18 minilm]            # the same, then times them: about a minute for each network

`static` and `dynamic` are quantize.Static and quantize.Dynamic, without options; `s8s8` has signed activations, `tensor` one scale for all
of a weight; `nncf` is NNCF's quantization of the same ONNX file, for MiniLM with its preset for transformers. Ratios are to the fastest of
the fp32 files. Needs nncf 3.4.0 for its row.
"""

import importlib.util
import logging
import sys
from pathlib import Path

import torch
from int8 import SAMPLES, feeds, ports
from prune_speed import network
from trained import NETWORKS

import multum
from multum.quantize import Dynamic, Static
from multum.runtime import bench
from multum.runtime.benchmark import verdict
from multum.runtime.engines import installed
from multum.task import calibration

STEPS = {"static": Static(), "s8s8": Static(signed=True), "tensor": Static(per_channel=False), "dynamic": Dynamic()}


def resnet18() -> multum.Task:
    """Random weights: only times are looked at."""
    task = network()
    batches = [({"pixel_values": torch.randn(4, 3, 224, 224)}, 0) for _ in range(4)]
    return multum.Task(task.model, task.example, calibration=batches, name=task.name)


def nncf_file(task: multum.Task, plain: Path, made: Path, transformer: bool) -> None:
    import nncf
    import onnx

    nncf.set_log_level(logging.ERROR)
    names = ports(plain)
    dataset = nncf.Dataset(list(calibration(task, SAMPLES)), lambda inputs: feeds(inputs, names))
    options = {"model_type": nncf.ModelType.TRANSFORMER} if transformer else {}
    model = onnx.load(plain)
    io = {one.key: one.value for one in model.metadata_props}
    found = nncf.quantize(model, dataset, subset_size=SAMPLES, **options)
    del found.metadata_props[:]
    for key, value in io.items():
        found.metadata_props.add(key=key, value=value)
    onnx.save(found, made)


def files(name: str) -> tuple[multum.Task, dict[str, Path]]:
    """The network as a task, and its files by what made them."""
    task, folder = resnet18() if name == "resnet18" else NETWORKS[name](), Path("out/bench/int8_speed") / name
    folder.mkdir(parents=True, exist_ok=True)
    found = {tool: folder / f"{tool}.onnx" for tool in ("fp32", *STEPS, "nncf")}
    for tool, path in found.items():
        if path.is_file() or (tool == "nncf" and not importlib.util.find_spec("nncf")):
            continue
        print(f"{name}: {tool}", flush=True)
        try:
            if tool == "nncf":
                nncf_file(task, found["fp32"], path, transformer=name == "minilm")
            else:
                multum.export(task.original if tool == "fp32" else multum.compress(task, STEPS[tool]).graph, path)
        except Exception as error:  # a peer that refuses a network has no figure for it
            if tool != "nncf":
                raise
            print(f"  nncf: {str(error).splitlines()[0][:150]}", flush=True)
    return task, {tool: path for tool, path in found.items() if path.is_file()}


def main() -> None:
    for name in [given for given in sys.argv[1:] if given != "--make"] or ("resnet18", "minilm"):
        task, made = files(name)
        for threads in () if "--make" in sys.argv else (1, 2):
            sessions: dict[str, multum.Session] = {}
            for tool, path in made.items():
                for engine in installed():
                    try:
                        sessions[f"{tool}, {engine}"] = multum.Session(path, engine=engine, threads=threads, spin=False)
                    except multum.MultumError as error:  # ONNX Runtime 1.31 cannot load what NNCF 3.4 makes of MiniLM
                        if tool != "nncf":
                            raise
                        print(f"  {tool}, {engine}: {str(error).splitlines()[0][:200]}", flush=True)
            measured = bench(sessions, task.example, batches=(1,), threads=(threads,), rounds=60, seconds=60)
            times = {one.candidate: one.median for one in measured.timings}
            fastest = min((key for key in times if key.startswith("fp32")), key=times.__getitem__)
            print(f"{name}, {threads} threads: fp32 {times[fastest]:.2f} ms ({fastest})", flush=True)
            for key in times:
                if not key.startswith("fp32"):
                    found = verdict(measured, key, fastest, 1, threads)
                    print(f"  {key:24} {times[key]:.2f} ms, {found.ratio:.2f}x ({found.low:.2f} to {found.high:.2f})", flush=True)
            for key, why in measured.skipped.items():
                print(f"  {key}: {why[:150]}")


if __name__ == "__main__":
    main()
