"""The process in which one candidate is measured: ``python -m multum.runtime.worker``, commanded over its standard input.

A process of its own, because engines wait busily after a call and spoil what is measured next in the same process.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from multum.errors import MultumError
from multum.runtime.engines import Array, Engine, cpus, message_of, open_engine
from multum.runtime.protocol import receive, send
from multum.runtime.timing import turn, undisturbed, warm


class Worker:
    """One engine with one model; each public method is a command."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._call: Callable[[], object] = lambda: None
        self._idle = 0
        self._seconds = 0.0

    def open(self, arrays: list[Array], engine: str, threads: int, path: str) -> dict[str, Any]:
        """Load the model at ``path``, or whose bytes are the only array. Memory counts from here."""
        importlib.import_module(engine)
        _forget_peak()
        self._idle = _memory("VmRSS") or 0
        pin = hasattr(os, "sched_setaffinity") and threads == cpus() > 1
        self._engine = open_engine(engine, path or arrays[0].tobytes(), threads, pin=pin)
        return {}

    def prepare(self, arrays: list[Array]) -> dict[str, Any]:
        """Warm up on the inputs ``arrays``."""
        engine = self._engine
        if engine is None:
            raise MultumError("No model is open.")

        def call() -> object:
            return engine.run(arrays)

        self._seconds = warm(call)
        self._call = call
        peak = _memory("VmHWM")
        return {"memory": None if peak is None else peak - self._idle}

    def sample(self, arrays: list[Array]) -> dict[str, Any]:
        return {"seconds": turn(self._call, self._seconds)}


def _memory(field: str) -> int | None:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at the peak. None on a system that does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _end_with_parent() -> None:
    """A worker is stopped while another one is measured; it must not stay so when the parent is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main() -> None:
    _end_with_parent()
    commands, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what engines print must not reach the answers
    worker = Worker()
    known: dict[str, Callable[..., dict[str, Any]]] = {"open": worker.open, "prepare": worker.prepare, "sample": worker.sample}
    with undisturbed():
        while (message := receive(commands)) is not None:
            header, arrays = message
            command = known[header["do"]]
            try:
                answer = command(arrays, **header["options"])
            except MultumError as error:
                answer = {"error": error.given}
            except Exception as error:  # engines raise their own kinds of RuntimeError and Exception
                answer = {"error": f"the engine fails on the model: {message_of(error)}"}
            send(answers, answer)


if __name__ == "__main__":
    main()
