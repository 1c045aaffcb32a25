"""What a benchmark measures in turns: a model in a process of its own, or a callable in this one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from multum.errors import ExportError, MultumError
from multum.graph.capture import arguments
from multum.runtime.protocol import receive, send
from multum.runtime.session import Session, onnx_source
from multum.runtime.timing import turn, undisturbed, warm

_IDLE = 0.01  # seconds until torch's threads have stopped waiting busily


class Runner(Protocol):
    """A candidate opened with a number of threads. ``prepare`` warms up and gives the peak memory [bytes], ``sample`` seconds per call."""

    def prepare(self, inputs: Any) -> int | None: ...

    def sample(self) -> float: ...

    def close(self) -> None: ...


class Remote:
    """A session's model in a worker process, which is stopped whenever it is not its turn."""

    def __init__(self, session: Session, model: str | bytes, threads: int):
        self._session = session
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, closed in close()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "multum.runtime.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )
        path, content = (model, []) if isinstance(model, str) else ("", [np.frombuffer(model, np.uint8)])
        try:
            self._ask("open", content, engine=session.engine, threads=threads, path=os.path.abspath(path) if path else "")
        except BaseException:
            self.close()
            raise

    def prepare(self, inputs: Any) -> int | None:
        args, kwargs = arguments(inputs)
        memory: int | None = self._ask("prepare", self._session.arrays(*args, **kwargs))["memory"]
        return memory

    def sample(self) -> float:
        return float(self._ask("sample")["seconds"])

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _ask(self, command: str, arrays: Any = (), **options: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        try:
            send(self._process.stdin, {"do": command, "options": options}, arrays)
            answer = receive(self._process.stdout)
        except BrokenPipeError:
            answer = None
        if answer is None:
            raise ExportError(f"its process ended with code {self._process.wait()}: {self._last_words()}")
        self._process.send_signal(signal.SIGSTOP)
        if "error" in answer[0]:
            raise ExportError(answer[0]["error"])
        return answer[0]

    def _last_words(self) -> str:
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - 2000))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


class Local:
    """A callable in this process. Its memory cannot be told from the rest of the process."""

    def __init__(self, call: Callable[..., Any], threads: int):
        if isinstance(call, torch.nn.Module) and call.training:
            raise MultumError("The model is in training mode.", "a model as it is deployed", "call model.eval() first")
        self._model, self._threads = call, threads
        self._call: Callable[[], Any] = lambda: None
        self._seconds = 0.0

    def prepare(self, inputs: Any) -> int | None:
        args, kwargs = arguments(inputs)
        self._call = lambda: self._model(*args, **kwargs)
        with self._alone():
            self._seconds = warm(self._call)
        return None

    def sample(self) -> float:
        with self._alone():
            return turn(self._call, self._seconds)

    def close(self) -> None:
        self._call = lambda: None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode(), undisturbed():
                yield
        finally:
            torch.set_num_threads(before)
            time.sleep(_IDLE)


def opener(candidate: Any, inputs: Any) -> Callable[[int], Runner]:
    """How to open a candidate (a session, the path of a file, or a callable) with a number of threads.

    A session that has not chosen its engine yet chooses it on ``inputs``.
    """
    if isinstance(candidate, str | os.PathLike):
        candidate = Session(candidate)
    if isinstance(candidate, Session):
        session, model = candidate, onnx_source(candidate.source)
        if session.engine == "auto":
            args, kwargs = arguments(inputs)
            session.choose(session.arrays(*args, **kwargs))
        return lambda threads: Remote(session, model, threads)
    if not callable(candidate):
        raise MultumError(f"A candidate is a {type(candidate).__name__}.", "a Session, the path of an .onnx or .mip file, or a callable")
    return lambda threads: Local(candidate, threads)
