"""A session runs an exported model, with inputs and outputs in the structure of the original."""

from __future__ import annotations

import json
import statistics
import time
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from multum.errors import ExportError, FileError, GraphError
from multum.graph.capture import arguments
from multum.graph.spec import Spec, check, flatten, unflatten
from multum.runtime.engines import Array, Engine, Port, installed, message_of, open_engine
from multum.runtime.timing import turn, warm

_ROUNDS = 7
_SECONDS = 1.5  # for choosing an engine
_IDLE = 0.06  # seconds until the threads of the engine that ran last have stopped waiting busily


def onnx_source(source: str | PathLike[str]) -> str | bytes:
    """What an engine loads: the path of an ``.onnx`` file, or a ``.mip`` file as ONNX in memory (nothing is left on disk)."""
    path = Path(source)
    if path.suffix not in (".onnx", ".mip"):
        raise FileError(
            f"{path} is neither an .onnx nor a .mip file.", "a file written by multum.save or multum.export", "save the model first"
        )
    if not path.is_file():
        raise FileError(f"There is no file {path}.", "an existing .onnx or .mip file", "check the path")
    if path.suffix == ".onnx":
        return str(path)
    from multum.export import to_onnx_bytes
    from multum.pack import load

    content: bytes = to_onnx_bytes(load(path))
    return content


class Session:
    """A model, loaded by an engine: call it like the original and get torch tensors.

    ``engine`` is ``onnxruntime``, ``openvino`` or ``auto``: the first inputs are run by all that are installed and the fastest is kept;
    ``timings`` has the milliseconds of each, and ``skipped`` why one was out of the race. ``threads`` 0: all processors.
    ``spin=False`` where several sessions share the processors.
    """

    def __init__(self, source: str | PathLike[str], engine: str = "auto", threads: int = 0, spin: bool = True):
        self.source, self.threads, self.spin = Path(source), threads, spin
        self.timings: dict[str, float] = {}
        self.skipped: dict[str, str] = {}
        model = onnx_source(source)
        names = installed() if engine == "auto" else [engine]
        self._engines: dict[str, Engine] = {}
        for name in names:
            try:
                self._engines[name] = open_engine(name, model, threads, spin)
            except FileError as error:
                self.skipped[name] = error.given
                if len(self.skipped) == len(names):
                    raise
        some = next(iter(self._engines.values()))
        self._ports = some.inputs
        self._inputs, self._outputs = _read_io(some.io, len(some.inputs), some.outputs)

    @property
    def engine(self) -> str:
        """The name of the engine, ``auto`` until one was chosen."""
        return next(iter(self._engines)) if len(self._engines) == 1 else "auto"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arrays = self.arrays(*args, **kwargs)
        if len(self._engines) > 1:
            self.choose(arrays)
        ((name, engine),) = self._engines.items()
        outputs = [torch.from_numpy(array) for array in _run(name, engine, arrays)]
        return unflatten(outputs, self._outputs)

    def predict(self, inputs: Any) -> Any:
        """The outputs for one batch as a task gives it: a tuple by position, a dict by name, anything else as the only argument."""
        args, kwargs = arguments(inputs)
        return self(*args, **kwargs)

    def arrays(self, *args: Any, **kwargs: Any) -> list[Array]:
        """The arrays that the engine gets for these inputs. Raises ``GraphError`` when structure, type or shape is not the model's."""
        spec = self._inputs or _plain_inputs(self._ports, bool(kwargs))
        leaves = flatten((args, kwargs), spec, "inputs")
        return [_array(leaf, port) for leaf, port in zip(leaves, self._ports, strict=True)]

    def choose(self, arrays: list[Array]) -> None:
        """Keep the engine that is fastest on ``arrays``, in turns, among those that agree with the first."""
        results = {}
        for name, engine in list(self._engines.items()):
            try:
                results[name] = _run(name, engine, arrays)
                if (error := _difference(next(iter(results.values())), results[name])) > 0.1:
                    raise ExportError(f"its outputs differ by {error:.0%} from those of {next(iter(results))}")
            except ExportError as failure:
                self.skipped[name] = failure.given
                del self._engines[name]
        if not self._engines:
            raise ExportError(f"No engine runs {self.source.name}: {'; '.join(self.skipped.values())}")
        calls = {name: lambda engine=engine: engine.run(arrays) for name, engine in self._engines.items()}
        about = {name: warm(call) for name, call in calls.items()}
        rounds: dict[str, list[float]] = {name: [] for name in calls}
        start = time.perf_counter()
        for number in range(_ROUNDS):
            for name in sorted(calls, reverse=bool(number % 2)):
                time.sleep(_IDLE)
                rounds[name].append(turn(calls[name], about[name]))
            if time.perf_counter() - start > _SECONDS:
                break
        self.timings = {name: statistics.median(times) * 1e3 for name, times in rounds.items()}
        fastest = min(self.timings, key=self.timings.__getitem__)
        self._engines = {fastest: self._engines[fastest]}


def _run(name: str, engine: Engine, arrays: list[Array]) -> list[Array]:
    try:
        return engine.run(arrays)
    except Exception as error:  # both engines raise their own kinds of RuntimeError and Exception
        raise ExportError(f"{name} fails on the model: {message_of(error)}", "inputs of sizes that the model was made for") from error


def _difference(expected: list[Array], found: list[Array]) -> float:
    """The largest relative error of a floating output."""
    pairs = [(a, b) for a, b in zip(expected, found, strict=True) if a.dtype.kind == "f" and a.size]
    return max((float(np.linalg.norm(a - b) / (np.linalg.norm(a) + 1e-12)) for a, b in pairs), default=0.0)


def _array(value: torch.Tensor | Array, port: Port) -> Array:
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype != port.dtype:
        raise GraphError(f"The input {port.name!r} is of type {dtype}.", port.dtype, f"convert it: x.to(torch.{port.dtype})")
    shape = tuple(value.shape)
    sizes = port.shape
    if sizes is not None and (len(shape) != len(sizes) or any(size not in (None, got) for size, got in zip(sizes, shape, strict=True))):
        expected = ", ".join("any" if size is None else str(size) for size in sizes)
        raise GraphError(
            f"The input {port.name!r} has the shape {list(shape)}.", f"[{expected}]", "give inputs in the shape of the example"
        )
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value


def _read_io(text: str, inputs: int, outputs: int) -> tuple[Spec | None, Spec]:
    """The specs that the exporter left in the file; without them inputs are plain and one output is a tensor, several are a tuple."""
    tensor: Spec = {"t": "tensor"}
    if not text:
        return None, tensor if outputs == 1 else {"t": "tuple", "c": [tensor] * outputs}
    try:
        io = json.loads(text)
        counts = check(io["inputs"]), check(io["outputs"])
        fits = counts == (inputs, outputs) and [part["t"] for part in io["inputs"]["c"]] == ["tuple", "dict"]
    except (GraphError, ValueError, KeyError, TypeError, RecursionError):
        fits = False
    if not fits:
        raise FileError("The structure of inputs and outputs in the file does not fit its model.", do="export the model again")
    return io["inputs"], io["outputs"]


def _plain_inputs(ports: tuple[Port, ...], named: bool) -> Spec:
    tensors: list[Spec] = [{"t": "tensor"} for _ in ports]
    by_name: Spec = {"t": "dict", "k": [port.name for port in ports], "c": tensors}
    none: Spec = {"t": "dict", "k": [], "c": []}
    return {"t": "tuple", "c": [{"t": "tuple", "c": [] if named else tensors}, by_name if named else none]}
