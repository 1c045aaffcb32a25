"""int8 weights and activations without training or options: `quantize.Static` and ONNX Runtime's static quantizer.

    python bench/int8.py fashion_mnist reuters imagenet_photos ...        # folders of examples/

Both get the same calibration batches; both files are run by ONNX Runtime on the test data, one thread. Agreement is that of the likeliest
class with the network in float.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch

import multum
from multum.quantize import Static
from multum.task import calibration, call, logits

SAMPLES = 256


def feeds(task: multum.Task, inputs, names: list[str]) -> dict[str, np.ndarray]:
    leaves = [leaf.numpy() for leaf in multum.task.tensors(inputs)]
    return dict(zip(names, leaves, strict=True))


def onnx_runtime(task: multum.Task, plain: Path, made: Path) -> None:
    """Its static quantizer: QDQ, u8s8, a scale per channel, min-max ranges (its default), after its own preparation of the file."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready = plain.with_suffix(".ready.onnx")
    quant_pre_process(str(plain), str(ready))
    names = [port.name for port in onnxruntime.InferenceSession(str(plain), providers=["CPUExecutionProvider"]).get_inputs()]

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = calibration(task, SAMPLES)

        def get_next(self):
            inputs = next(self.batches, None)
            return None if inputs is None else feeds(task, inputs, names)

    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(str(ready), str(made), Reader(), quant_format=QuantFormat.QDQ, per_channel=True, **kinds)


def scored(task: multum.Task, predict) -> tuple[float, torch.Tensor]:
    seen = []

    def note(inputs):
        outputs = predict(inputs)
        seen.append(logits(outputs).argmax(-1).flatten())
        return outputs

    score = float(np.mean(task.score(note, "test")))
    return score, torch.cat(seen)


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        task = multum.load_task(f"examples/{name}/task.py")
        with torch.inference_mode():
            before, labels = scored(task, lambda inputs, graph=task.original: call(graph, inputs))
        print(f"{task.name}: {before:.2f} in float", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            plain = multum.export(task.original, Path(folder) / "plain.onnx")
            ours = multum.export(multum.compress(task, Static()).graph, Path(folder) / "multum.onnx")
            theirs = Path(folder) / "onnxruntime.onnx"
            onnx_runtime(task, plain, theirs)
            for tool, path in (("multum", ours), ("onnxruntime", theirs)):
                session = multum.Session(path, engine="onnxruntime", threads=1)
                score, found = scored(task, session.predict)
                agreement = 100 * float((found == labels).float().mean())
                print(f"  {tool:12} {score:.2f}, drop {before - score:.2f}, agreement {agreement:.2f} %", flush=True)


if __name__ == "__main__":
    main()
