"""The engines that run ONNX: one small class each, numpy arrays in and out, no torch (measuring processes start fast)."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from multum.errors import FileError, MissingExtra, MultumError, near

Array = npt.NDArray[Any]

IO_KEY = "multum.io"
"""The key in an ONNX file's ``metadata_props`` under which the structure of inputs and outputs stands."""


@dataclass(frozen=True)
class Port:
    """One input of a model. ``None`` in ``shape``: any size."""

    name: str
    dtype: str
    shape: tuple[int | None, ...] | None


class Engine(Protocol):
    inputs: tuple[Port, ...]
    outputs: int
    io: str

    def run(self, arrays: Sequence[Array]) -> list[Array]: ...


class OnnxRuntime:
    """ONNX Runtime on the CPU.

    Its threads wait busily for about 50 ms after a call: fastest for a lone session, a drag on every other one. ``spin=False`` ends it.
    """

    def __init__(self, model: str | bytes, threads: int, spin: bool, pin: bool):
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
        processors = sorted(os.sched_getaffinity(0)) if pin else []
        if pin:  # they are counted from 1, and the calling thread is the first
            others = (str(number + 1) for number in processors[1:threads])
            options.add_session_config_entry("session.intra_op_thread_affinities", ";".join(others))
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        if pin:
            os.sched_setaffinity(0, {processors[0]})
        self.inputs = tuple(_onnxruntime_port(one.name, one.type, one.shape) for one in self._session.get_inputs())
        self.outputs = len([_onnxruntime_port(one.name, one.type, one.shape) for one in self._session.get_outputs()])
        self.io = self._session.get_modelmeta().custom_metadata_map.get(IO_KEY, "")

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        feed = {port.name: array for port, array in zip(self.inputs, arrays, strict=True)}
        return list(self._session.run(None, feed))


class OpenVino:
    """OpenVINO on the CPU, in float32: its own default, bfloat16, is slower on processors without matrix units and less exact."""

    def __init__(self, model: str | bytes, threads: int, spin: bool, pin: bool):
        import openvino as ov

        core = ov.Core()
        read = core.read_model(model=model)
        config = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": pin,
        }
        self._model = core.compile_model(read, "CPU", config)
        self._requests = threading.local()  # a request serves one call at a time
        self.inputs = tuple(_openvino_port(port) for port in self._model.inputs)
        self.outputs = len(self._model.outputs)
        path = ["framework", IO_KEY]
        self.io = read.get_rt_info(path).astype(str) if read.has_rt_info(path) else ""

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        if not hasattr(self._requests, "own"):
            self._requests.own = self._model.create_infer_request()
        return list(self._requests.own.infer(list(arrays), share_inputs=True).to_tuple())


ENGINES: dict[str, Callable[[str | bytes, int, bool, bool], Engine]] = {"onnxruntime": OnnxRuntime, "openvino": OpenVino}


def installed() -> list[str]:
    """The names of the engines that are installed here."""
    return [name for name in ENGINES if importlib.util.find_spec(name)]


def open_engine(name: str, model: str | bytes, threads: int, spin: bool = True, pin: bool = False) -> Engine:
    """The engine ``name`` with the model, a path or the content of an ONNX file, loaded. ``threads`` 0: all.

    ``pin`` ties each thread to a processor of its own, the calling thread to the first: a busy system otherwise may keep two threads of
    ONNX Runtime on one processor for as long as the process lives. OpenVINO always ties its threads itself.
    Raises ``MissingExtra`` for an engine that is not installed, ``FileError`` for a model that it cannot load.
    """
    if name not in ENGINES:
        raise MultumError(f"There is no engine {name!r}.", f"'auto' or one of {', '.join(ENGINES)}", f"use {near(name, ENGINES)}")
    if name not in installed():
        raise MissingExtra(name, name, f"The engine {name!r}")
    if not 0 <= threads <= cpus():
        raise MultumError(f"{threads} threads are asked for.", f"0 (all) to {cpus()}, what this machine has", "use threads=0")
    try:
        return ENGINES[name](model, threads or cpus(), spin, pin)
    except MultumError:
        raise
    except Exception as error:  # both raise their own kinds of RuntimeError and Exception
        what = f"The file {Path(model).name}" if isinstance(model, str) else "The exported model"
        raise FileError(f"{what} cannot be loaded by {name}: {message_of(error)}", "a valid ONNX model", "export it again") from error


def cpus() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def message_of(error: BaseException) -> str:
    """What an engine's error says on one line, without the places in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith(("Exception from", "Check '"))]
    return " ".join(lines)[:300] or type(error).__name__


_ONNXRUNTIME_TYPES = {"float": "float32", "double": "float64"} | {
    name: name for name in ("float16", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")
}


def _onnxruntime_port(name: str, kind: str, shape: Sequence[Any]) -> Port:
    dtype = _ONNXRUNTIME_TYPES.get(kind.removeprefix("tensor(").removesuffix(")"))
    if dtype is None:
        raise FileError(f"The model's input or output {name!r} is a {kind}.", f"tensors of {', '.join(_ONNXRUNTIME_TYPES)}")
    return Port(name, dtype, tuple(size if isinstance(size, int) else None for size in shape))


def _openvino_port(port: Any) -> Port:
    shape = port.partial_shape
    sizes = None if shape.rank.is_dynamic else tuple(None if size.is_dynamic else size.get_length() for size in shape)
    return Port(port.any_name, port.element_type.to_dtype().name, sizes)
