"""How fast a candidate is: each model on every engine that is installed, in turns, the fastest of one against the fastest of the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ExportError, MultumError
from ..graph import Graph
from ..runtime.benchmark import Bench, Timing, batch_size, bench, best, verdict
from ..runtime.engines import installed
from ..runtime.session import Session
from ..task import tensors

LARGE = 32  # samples of the large batch, where the task's own is smaller
_QUICK: Mapping[str, Any] = {"rounds": 15, "seconds": 5.0}
_FULL: Mapping[str, Any] = {"rounds": 30, "seconds": 40.0}


@dataclass(frozen=True)
class Pair:
    """Original and candidate, each on its fastest engine, at one batch size and number of threads; `low` and `high` bound the `ratio`."""

    original: Timing
    candidate: Timing
    ratio: float
    low: float | None
    high: float | None
    reason: str

    @property
    def baseline(self) -> str:
        return _engine(self.original)

    @property
    def headline(self) -> dict[str, Any]:
        """The ratio, its bounds, and against what."""
        return {"ratio": self.ratio, "low": self.low, "high": self.high, "baseline": self.baseline}

    def to_data(self) -> dict[str, Any]:
        return {
            "batch": self.original.batch, "threads": self.original.threads,
            "original": self.original.median, "baseline": self.baseline,
            "compressed": self.candidate.median, "engine": _engine(self.candidate),
            "ratio": self.ratio, "low": self.low, "high": self.high,
        }  # fmt: skip


@dataclass(frozen=True)
class Times:
    """All pairs; the first is the one that counts: one sample on all threads."""

    pairs: tuple[Pair, ...]
    measured: Bench

    def to_data(self) -> dict[str, Any]:
        rows = [pair.to_data() for pair in self.pairs]
        return {"rows": rows, "verdict": self.pairs[0].reason, **self.measured.to_dict()}


def alone(model: Path, inputs: Any) -> float:
    """Milliseconds for one sample on the fastest engine, with all threads."""
    sessions = _sessions("original", model)
    measured = bench(sessions, inputs, batches=(1,), threads=(0,), **_QUICK)
    found = measured.timing(best(measured, sessions))
    assert found is not None
    return found.median


def quick(original: Path, candidate: Path, inputs: Any) -> Pair:
    """One sample on all threads, in a few seconds."""
    return _compare(original, candidate, inputs, (1,), (0,), _QUICK).pairs[0]


def full(original: Path, candidate: Path, inputs: Any) -> Times:
    """One sample and a large batch, on one and on all threads."""
    return _compare(original, candidate, inputs, (1, max(LARGE, batch_size(inputs))), (1, 0), _FULL)


def inputs_of(graph: Graph) -> Any:
    """A batch of the captured shapes to time a graph on whose task is not at hand: normal numbers, and zeros where integers go in."""
    generator = torch.Generator().manual_seed(0)
    args, kwargs = graph.example()
    for tensor in tensors((args, kwargs)):
        if tensor.is_floating_point():
            tensor.normal_(generator=generator)
    return kwargs or args


def _compare(
    original: Path, candidate: Path, inputs: Any, batches: tuple[int, ...], threads: tuple[int, ...], effort: Mapping[str, Any]
) -> Times:
    originals, candidates = _sessions("original", original), _sessions("compressed", candidate)
    measured = bench(originals | candidates, inputs, batches=batches, threads=threads, **effort)
    ran = [{(one.batch, one.threads) for one in measured.timings if one.candidate in names} for names in (originals, candidates)]
    pairs = tuple(
        _pair(measured, best(measured, originals, *setting), best(measured, candidates, *setting), setting)
        for setting in sorted(ran[0] & ran[1], key=lambda setting: (setting[0], -setting[1]))
    )
    if not pairs:
        raise ExportError("No engine runs both models.", "at least one", "; ".join(measured.skipped.values()))
    return Times(pairs, measured)


def _pair(measured: Bench, original: str, candidate: str, setting: tuple[int, int]) -> Pair:
    before, after = measured.timing(original, *setting), measured.timing(candidate, *setting)
    assert before is not None
    assert after is not None
    found = verdict(measured, candidate, original, *setting)
    ratio = before.median / after.median if found.ratio is None else found.ratio
    return Pair(before, after, ratio, found.low, found.high, found.reason)


def _sessions(name: str, path: Path) -> dict[str, Session]:
    """The model on each engine that loads it."""
    found, failed = {}, []
    for engine in installed():
        try:
            found[f"{name} on {engine}"] = Session(path, engine=engine)
        except MultumError as error:
            failed.append(error.given)
    if not found:
        raise ExportError(f"No engine loads {path}: {'; '.join(failed)}")
    return found


def _engine(timing: Timing) -> str:
    return timing.candidate.rpartition(" ")[2]
