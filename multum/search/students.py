"""Which student? Candidates with the size of their file, their time and a score that costs no training."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..distill import affinity, light, student, zoo
from ..errors import MultumError
from ..export import to_onnx_bytes
from ..graph import Graph, capture
from ..pack import save
from ..runtime.benchmark import bench
from ..runtime.engines import installed
from ..runtime.session import Session
from ..task import Task

WIDTHS, DEPTHS = (0.75, 0.5, 0.25), (1.0, 0.5)


@dataclass(frozen=True)
class Candidate:
    """A student: bytes of its `.mip` file as it is, milliseconds for one sample on one thread, and `distill.affinity`."""

    name: str
    parameters: int
    bytes: int
    ms: float
    score: float


@dataclass(frozen=True)
class Students:
    """The original first, then the candidates, largest file first; and why others are not among them."""

    rows: tuple[Candidate, ...]
    skipped: dict[str, str]

    def to_data(self) -> dict[str, Any]:
        return {"rows": [asdict(row) for row in self.rows], "skipped": self.skipped}


def students(task: Task, widths: Sequence[float] = WIDTHS, depths: Sequence[float] = DEPTHS, seconds: float = 20.0) -> Students:
    """What a student of the task's model could be: the model cut to some widths and depths, and the light networks that fit.

    Every candidate is written to a file and timed in turns with the others, for so many seconds in all. None is trained.
    """
    graphs, skipped = {"original": task.original}, dict[str, str]()
    for name, made in _candidates(task, widths, depths):
        if isinstance(made, Graph):
            graphs[name] = made
        else:
            skipped[name] = made
    with tempfile.TemporaryDirectory() as folder:
        sizes = {name: save(graph, Path(folder) / "model.mip") for name, graph in graphs.items()}
        sessions = {}
        for place, (name, graph) in enumerate(list(graphs.items())):
            file = Path(folder) / f"{place}.onnx"
            try:
                file.write_bytes(to_onnx_bytes(graph))
                sessions[name] = Session(file, engine=installed()[0], threads=1)
            except MultumError as error:
                skipped[name] = error.given
        measured = bench(sessions, task.example, batches=(1,), threads=(1,), rounds=12, seconds=seconds)
    rows = []
    for name in sessions:
        timing, graph = measured.timing(name, 1, 1), graphs[name]
        if timing is None:
            skipped[name] = measured.skipped.get((name, 1, 1), "it was not timed")
            continue
        parameters = sum(parameter.numel() for parameter in graph.parameters())
        rows.append(Candidate(name, parameters, sizes[name], timing.median, affinity(graph, task)))
    return Students(tuple(sorted(rows, key=lambda row: (row.name != "original", -row.bytes))), skipped)


def _candidates(task: Task, widths: Sequence[float], depths: Sequence[float]) -> Iterator[tuple[str, Graph | str]]:
    """Each candidate by name, or the reason why there is none."""
    for width in (1.0, *widths):
        for depth in depths:
            if width == depth == 1.0:
                continue
            name = f"width {width:g}, depth {depth:g}"
            try:
                yield name, student(task.original, width, depth, task)
            except MultumError as error:
                yield name, error.given
    try:
        for name in zoo(task):
            yield name, capture(light(name, task).eval(), task.example)
    except MultumError as error:
        yield "light networks", error.given
