"""int8 weights and activations without training or options: `quantize.Static`, NNCF and ONNX Runtime's static quantizer.

    python bench/int8.py [resnet20 minilm ...]        # networks of bench/trained.py, all when none is named
    python bench/int8.py --bits 4 [...]               # 4-bit weights and 8-bit activations, without the peers
    python bench/int8.py --steps "Equalize(), Static()" [...]    # any steps of multum.quantize, without the peers; sizes of the files too

All get the same calibration batches; files are run on the test data, one thread: ours by ONNX Runtime and by OpenVINO, NNCF's by OpenVINO,
ONNX Runtime's by itself. Agreement is that of the likeliest class with the network in float; of EfficientNet also on all photos. NNCF's
second row is its preset for transformers, which its user has to ask for. Needs nncf 3.4.0 (pip install nncf) for its rows.
"""

import argparse
import importlib.util
import json
import logging
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from trained import NETWORKS, photos

import multum
from multum import quantize
from multum.task import calibration, call, labels

SAMPLES = 256


def ports(plain: Path) -> list[str]:
    return [port.name for port in onnxruntime.InferenceSession(str(plain), providers=["CPUExecutionProvider"]).get_inputs()]


def feeds(inputs, names: list[str]) -> dict[str, np.ndarray]:
    leaves = [leaf.numpy() for leaf in multum.task.tensors(inputs)]
    return dict(zip(names, leaves, strict=True))


def onnx_runtime(task: multum.Task, plain: Path, made: Path) -> None:
    """Its static quantizer: QDQ, u8s8, a scale per channel, min-max ranges (its default), after its own preparation of the file."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready = plain.with_suffix(".ready.onnx")
    quant_pre_process(str(plain), str(ready))
    names = ports(plain)

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = calibration(task, SAMPLES)

        def get_next(self):
            inputs = next(self.batches, None)
            return None if inputs is None else feeds(inputs, names)

    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(str(ready), str(made), Reader(), quant_format=QuantFormat.QDQ, per_channel=True, **kinds)


def nncf_file(task: multum.Task, plain: Path, made: Path, **options) -> None:
    """NNCF's post-training quantization of the OpenVINO model, bias correction included, which is its default."""
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    model, names = openvino.Core().read_model(plain), ports(plain)
    dataset = nncf.Dataset(list(calibration(task, SAMPLES)), lambda inputs: feeds(inputs, names))
    openvino.save_model(nncf.quantize(model, dataset, subset_size=SAMPLES, **options), made, compress_to_fp16=False)


class Compiled:
    """A file in OpenVINO's own format."""

    def __init__(self, path: Path):
        import openvino

        self.model = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})

    def predict(self, inputs):
        found = self.model([leaf.numpy() for leaf in multum.task.tensors(inputs)])
        return torch.from_numpy(found[0])


def scored(task: multum.Task, predict) -> tuple[float, torch.Tensor]:
    seen = []

    def note(inputs):
        outputs = predict(inputs)
        seen.append(labels(outputs).flatten())
        return outputs

    score = float(np.mean(task.score(note, "test")))
    return score, torch.cat(seen)


def rows(task: multum.Task, steps: list[multum.Step], peers: bool):
    """A row for each file and engine: name, how to predict with it, seconds that it took to make."""
    with tempfile.TemporaryDirectory() as name:
        folder, start = Path(name), time.process_time()
        result = multum.compress(task, steps)
        ours = multum.export(result.graph, folder / "multum.onnx", inputs=list(calibration(task, 64)))
        took = time.process_time() - start
        if not peers:
            print(f"  ONNX {ours.stat().st_size:,} bytes, .mip {multum.save(result, folder / 'multum.mip', task):,}", flush=True)
        for engine in ("onnxruntime", "openvino"):
            yield f"multum, {engine}", multum.Session(ours, engine=engine, threads=1).predict, took
        if not peers:
            return
        plain = multum.export(task.original, folder / "plain.onnx")
        makers = {"onnxruntime": lambda to: onnx_runtime(task, plain, to)}
        if importlib.util.find_spec("nncf"):
            import nncf

            makers["nncf"] = lambda to: nncf_file(task, plain, to)
            makers["nncf, transformer"] = lambda to: nncf_file(task, plain, to, model_type=nncf.ModelType.TRANSFORMER)
        for tool, make in makers.items():
            made, start = folder / ("peer.onnx" if tool == "onnxruntime" else f"peer{len(tool)}.xml"), time.process_time()
            try:
                make(made)
            except Exception as error:  # a peer that refuses a network has no figure for it
                print(f"  {tool:20} failed: {str(error).splitlines()[0][:100]}", flush=True)
                continue
            session = multum.Session(made, engine="onnxruntime", threads=1) if made.suffix == ".onnx" else Compiled(made)
            yield tool, session.predict, time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("networks", nargs="*")
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--steps")
    parser.add_argument("--out", help="a file to which a line of JSON is added for each row")
    given = parser.parse_args()
    torch.set_num_threads(1)
    steps = list(eval(f"[{given.steps}]", dict(vars(quantize)))) if given.steps else [quantize.Static(weight_bits=given.bits)]
    peers, drops = given.bits == 8 and not given.steps, dict[str, list[float]]()
    for name in given.networks or NETWORKS:
        task = NETWORKS[name]()
        with torch.inference_mode():
            before, right = scored(task, lambda inputs, graph=task.original: call(graph, inputs))
        print(f"{name}: {before:.2f} in float, {len(right):,} labels", flush=True)
        for tool, predict, seconds in rows(task, steps, peers):
            score, found = scored(task, predict)
            agreement = 100 * float((found == right).float().mean())
            drops.setdefault(tool, []).append(before - score)
            print(f"  {tool:20} {score:.2f}, drop {before - score:.2f}, agreement {agreement:.2f} %, {seconds:.0f} s", flush=True)
            if name == "efficientnet":
                with torch.inference_mode():
                    same = [labels(predict(images)) == labels(call(task.original, images)) for images, _ in photos()]
                print(f"    all photos: {100 * float(torch.cat(same).float().mean()):.2f} % of {len(torch.cat(same))}", flush=True)
            if given.out:
                row = vars(given) | {"network": name, "tool": tool, "before": before, "score": score, "agreement": agreement}
                with Path(given.out).open("a") as file:
                    file.write(json.dumps(row) + "\n")
    for tool, several in drops.items():
        print(f"{tool:20} median drop {np.median(several):.2f}, worst {max(several):.2f} of {len(several)} networks")


if __name__ == "__main__":
    main()
