"""One candidate: compressed, written, read back, exported, run, scored and timed. What is on the disk is what is judged."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .. import __version__
from ..errors import FileError, StepError, TaskError
from ..export import export
from ..graph import Graph
from ..pack import load, save
from ..runtime import Session
from ..step import Recipe, compress
from ..task import Task, tensors
from .times import alone, quick

Tell = Callable[[str], None]
Scores = NDArray[np.float64] | float
_HELD = 2  # batches


@dataclass(frozen=True, eq=False)
class Candidate:
    """A compressed model on the disk, and what was measured of it; `scores` and `latency` are None until it was."""

    name: str
    recipe: Recipe
    folder: Path
    bytes: int
    seconds: float
    records: list[dict[str, Any]] = field(default_factory=list)
    scores: Scores | None = None
    latency: float | None = None  # milliseconds for one sample
    speed: float | None = None  # times the original's best engine

    @property
    def model(self) -> Path:
        return self.folder / "model.mip"

    @property
    def onnx(self) -> Path:
        return self.folder / "model.onnx"

    @property
    def score(self) -> float | None:
        return None if self.scores is None else float(np.mean(self.scores))

    def to_data(self) -> dict[str, Any]:
        plain = {key: getattr(self, key) for key in ("name", "bytes", "seconds", "latency", "speed", "score")}
        return plain | {"recipe": self.recipe.to_data()}


class Workshop:
    """Makes and measures candidates of one task, each in a folder of its own; what was finished there is not done again."""

    def __init__(self, task: Task, folder: Path, tell: Tell):
        self.task, self.tell = task, tell
        self.identity = _identity(task)
        self.folder = folder / self.identity[:12]
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def steps(self) -> Path:
        """Where the finished steps of long recipes are kept."""
        return self.folder / "steps"

    def original(self) -> Candidate:
        """The task's model as it came: its safetensors file is the yardstick of sizes, its ONNX file that of speed."""
        folder = self.folder / "original"
        nothing = Recipe([])
        if kept := _read(folder, "original", nothing):
            return kept
        start = time.perf_counter()
        with writing(folder):
            folder.mkdir(exist_ok=True)
            size = _save_weights(self.task, folder / "original.safetensors")
        export(self.task.original, folder / "model.onnx", inputs=self._held())
        made = Candidate("original", nothing, folder, size, 0.0)
        made = replace(made, scores=self._scores(made), latency=alone(made.onnx, self.task.example), speed=1.0)
        return _keep(replace(made, seconds=time.perf_counter() - start))

    def build(self, name: str, recipe: Recipe) -> Candidate:
        """The candidate's file, so that its size is known; not measured yet."""
        key = hashlib.sha256(json.dumps(recipe.to_data(), sort_keys=True).encode()).hexdigest()
        folder = self.folder / key[:12]
        if kept := _read(folder, name, recipe):
            return kept
        start = time.perf_counter()
        trains = any(step.stage is None for step in recipe.flat())
        with writing(folder):
            result = compress(self.task, recipe, workdir=self.steps, tell=self.tell) if trains else compress(self.task, recipe)
            folder.mkdir(exist_ok=True)
            size = save(result, folder / "model.mip", self.task)
        records = [record.to_data() for record in result.records]
        return _keep(Candidate(name, recipe, folder, size, time.perf_counter() - start, records))

    def measure(self, candidate: Candidate, original: Candidate) -> Candidate:
        """The candidate with score and latency of its deployed file."""
        if candidate.latency is not None:
            return candidate
        start = time.perf_counter()
        export(self.graph(candidate), candidate.onnx, inputs=self._held())
        try:
            scores = self._scores(candidate)
        except TaskError as error:  # the data passed with the original
            raise StepError(f"{candidate.name}: {error.given}", "outputs that can be scored") from error
        pair = quick(original.onnx, candidate.onnx, self.task.example)
        seconds = candidate.seconds + time.perf_counter() - start
        return _keep(replace(candidate, scores=scores, latency=pair.candidate.median, speed=pair.ratio, seconds=seconds))

    def graph(self, candidate: Candidate) -> Graph:
        """What the candidate's file holds."""
        return load(candidate.model)

    def _held(self) -> list[Any] | None:
        """Some batches of inputs on which an exported file is compared with its graph; None without validation data."""
        if self.task.validation is None:
            return None
        return [inputs for inputs, _ in islice(self.task.data("validation"), _HELD)]

    def _scores(self, candidate: Candidate) -> Scores | None:
        if self.task.validation is None:
            return None
        return self.task.score(Session(candidate.onnx).predict, "validation")


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turns what the operating system says of a full or closed disk into a FileError."""
    try:
        yield
    except OSError as error:
        raise FileError(f"{place} cannot be written: {error.strerror or error}.", do="free some space, or choose another place") from error


def write(path: Path, text: str) -> None:
    """Writes a file that appears under its name only when it is whole."""
    with writing(path):
        partial = path.with_name(f".{path.name}.part")
        try:
            partial.write_text(text)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _identity(task: Task) -> str:
    """A hash of version, model, seed and the first validation batch: candidates of another task are not mixed up."""
    digest = hashlib.sha256(f"{__version__} {task.original.fingerprint()} {task.seed}".encode())
    if task.validation is not None:
        for tensor in tensors(next(iter(task.data("validation")))):
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _save_weights(task: Task, path: Path) -> int:
    """The model's tensors as they came, each stored once, in the usual format; its size in bytes."""
    from safetensors.torch import save_file

    kept: dict[Any, tuple[str, Tensor]] = {}
    for name, tensor in task.model.state_dict().items():
        kept.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), (name, tensor.detach().cpu().contiguous().clone()))
    save_file(dict(kept.values()), path)
    return path.stat().st_size


def _keep(candidate: Candidate) -> Candidate:
    data = candidate.to_data() | {"records": candidate.records}
    if isinstance(candidate.scores, np.ndarray):
        with writing(candidate.folder):
            np.save(candidate.folder / "scores.npy", candidate.scores)
    write(candidate.folder / "candidate.json", json.dumps(data))
    return candidate


def _read(folder: Path, name: str, recipe: Recipe) -> Candidate | None:
    if not (folder / "candidate.json").is_file():
        return None
    data = json.loads((folder / "candidate.json").read_text())
    scores: Scores | None = data["score"]
    if (folder / "scores.npy").is_file():
        scores = np.load(folder / "scores.npy", allow_pickle=False)
    return Candidate(name, recipe, folder, data["bytes"], data["seconds"], data["records"], scores, data["latency"], data["speed"])
