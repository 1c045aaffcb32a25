"""Which candidate is faster, measured in turns: a round times each one once, in random order, so what disturbs one disturbs all."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import itertools
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from multum.analyze.statistics import median_interval
from multum.errors import MultumError, near
from multum.graph.capture import arguments
from multum.graph.spec import flatten, spec_of, unflatten
from multum.runtime.candidate import Runner, opener
from multum.runtime.engines import cpus, message_of
from multum.runtime.session import Session

_PROCESSES = 3  # two processes with one and the same file differ for as long as they live, so each candidate gets several
_ALIKE = 1.03  # and by about so much even then

Key = tuple[str, int, int]  # candidate, batch size, threads
T = TypeVar("T")
Candidate = Session | Callable[..., Any] | str | PathLike[str]


@dataclass(frozen=True)
class Timing:
    """One candidate at one batch size and number of threads.

    ``rounds``: milliseconds per call, a row for each process that the candidate ran in; the same place in two timings of one setting is the
    same round.
    ``memory``: peak bytes above the process with nothing but the engine imported; None for a callable.
    """

    candidate: str
    batch: int
    threads: int
    rounds: tuple[tuple[float, ...], ...]
    memory: int | None

    @property
    def median(self) -> float:
        return statistics.median(itertools.chain(*self.rounds))

    def to_dict(self) -> dict[str, Any]:
        p10, p90 = np.percentile(list(itertools.chain(*self.rounds)), [10, 90]).tolist()
        numbers = {"median": self.median, "p10": p10, "p90": p90, "rounds": [list(row) for row in self.rounds]}
        return {"candidate": self.candidate, "batch": self.batch, "threads": self.threads, "memory": self.memory, "milliseconds": numbers}


@dataclass(frozen=True)
class Bench:
    """What was measured. ``skipped`` has the reason for every timing that is missing, by candidate, batch size and threads."""

    timings: tuple[Timing, ...]
    skipped: dict[Key, str]
    machine: dict[str, Any]

    @property
    def setting(self) -> tuple[int, int]:
        """The batch size and threads that count where none are named: the smallest batch, as in answering one request, on most threads."""
        settings = [(one.batch, one.threads) for one in self.timings] or [key[1:] for key in self.skipped]
        return min(settings, key=lambda setting: (setting[0], -setting[1]))

    def timing(self, candidate: str, batch: int | None = None, threads: int | None = None) -> Timing | None:
        """The timing of a candidate, None when it was skipped. Raises ``MultumError`` for what was not asked of the benchmark."""
        key = (candidate, batch or self.setting[0], threads or self.setting[1])
        known = {(one.candidate, one.batch, one.threads): one for one in self.timings}
        if key not in known and key not in self.skipped:
            names = {one for one, _, _ in (*known, *self.skipped)}
            hint = "choose a setting that was measured" if candidate in names else f"use {near(candidate, names)}"
            raise MultumError(f"{candidate!r} was not measured at batch {key[1]} on {key[2]} threads.", do=hint)
        return known.get(key)

    def to_dict(self) -> dict[str, Any]:
        skipped = [
            {"candidate": name, "batch": batch, "threads": threads, "reason": why} for (name, batch, threads), why in self.skipped.items()
        ]
        return {"timings": [one.to_dict() for one in self.timings], "skipped": skipped, "machine": self.machine}


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate is faster than a baseline: ``ratio`` times, with 95 % confidence ``low`` to ``high`` times.

    The interval is that of the median of the paired rounds, widened to the medians of the single processes, and by 3 %.
    """

    faster: bool
    ratio: float | None
    low: float | None
    high: float | None
    reason: str


def bench(
    candidates: Mapping[str, Candidate],
    inputs: Any,
    *,
    batches: Sequence[int] = (),
    threads: Sequence[int] = (1, 0),
    rounds: int = 30,
    seconds: float = 60.0,
) -> Bench:
    """Time the candidates on ``inputs``, one batch as a task gives it.

    ``batches``: 1 and the batch's own size where none are given; the batch is cut or repeated along the first dimension of its tensors.
    ``threads``: 0 is all. ``seconds`` are shared by all settings; each gets its ``rounds`` or fewer, but at least six.
    A session or file runs in a process of its own, stopped while it is not its turn and started anew for every third of the rounds;
    a callable runs here.
    """
    size = batch_size(inputs)
    batches = sorted(set(batches or (1, size)))
    counts = sorted({count or cpus() for count in threads})
    if not candidates or batches[0] < 1 or counts[0] < 1 or counts[-1] > cpus() or rounds < 1:
        raise MultumError(
            f"{len(candidates)} candidates at batches {batches} on {counts} threads for {rounds} rounds.",
            f"at least one of each, and at most {cpus()} threads",
        )
    openers = {name: opener(candidate, resized(inputs, batches[0])) for name, candidate in candidates.items()}
    log = _Log()
    end = time.perf_counter() + seconds
    visits = counts * _PROCESSES
    for number, count in enumerate(visits):
        left = (len(visits) - number) * len(batches)
        with contextlib.ExitStack() as stack:
            runners: dict[str, Runner] = {}
            for name, open_runner in openers.items():
                if all((name, batch, count) in log.skipped for batch in batches):
                    continue
                if runner := log.attempt(name, batches, count, functools.partial(open_runner, count)):
                    stack.callback(runner.close)
                    runners[name] = runner
            for place, batch in enumerate(batches):
                now = time.perf_counter()
                until = now + (end - now) / (left - place)
                _in_turns(log, runners, resized(inputs, batch), (batch, count), -(-rounds // _PROCESSES), until)
    timings = [Timing(*key, tuple(rows), log.memory[key]) for key, rows in log.rows.items() if key not in log.skipped]
    return Bench(tuple(timings), log.skipped, machine())


def best(measured: Bench, names: Iterable[str], batch: int | None = None, threads: int | None = None) -> str:
    """The fastest of the candidates ``names``: the baseline against which a gain counts."""
    found = [timing for name in names if (timing := measured.timing(name, batch, threads))]
    if not found:
        raise MultumError(f"None of {', '.join(map(repr, names))} could be measured.", "at least one baseline that runs")
    return min(found, key=lambda timing: timing.median).candidate


def verdict(measured: Bench, candidate: str, baseline: str, batch: int | None = None, threads: int | None = None) -> Verdict:
    """Faster only if the whole interval of the median paired ratio lies above 1."""
    setting = batch or measured.setting[0], threads or measured.setting[1]
    one, other = measured.timing(candidate, *setting), measured.timing(baseline, *setting)
    where = f"at batch {setting[0]} on {setting[1]} threads"
    if one is None or other is None:
        missing = candidate if one is None else baseline
        return Verdict(False, None, None, None, f"not measured {where}: {missing}: {measured.skipped[(missing, *setting)]}")
    rows = [[b / a for a, b in zip(*row, strict=True)] for row in zip(one.rounds, other.rounds, strict=True)]
    ratios = list(itertools.chain(*rows))
    ratio, interval = statistics.median(ratios), median_interval(ratios)
    if interval is None:
        return Verdict(False, ratio, None, None, f"too few rounds {where}: {len(ratios)}, an interval needs 6")
    each = [statistics.median(row) for row in rows]
    low, high = min(interval[0], *each) / _ALIKE, max(interval[1], *each) * _ALIKE
    word = "faster" if low > 1 else "slower" if high < 1 else "inside the noise"
    return Verdict(low > 1, ratio, low, high, f"{word}: {ratio:.2f}x ({low:.2f} to {high:.2f}) the speed of {baseline} {where}")


def batch_size(inputs: Any) -> int:
    """The first dimension of the first tensor that has one."""
    arrays = arguments(inputs)
    for leaf in flatten(arrays, spec_of(arrays, "inputs"), "inputs"):
        if leaf.ndim and leaf.shape[0]:
            return int(leaf.shape[0])
    raise MultumError("The inputs hold no tensor with a batch dimension.", "one batch, the samples along the first dimension")


def resized(inputs: Any, batch: int) -> Any:
    """``inputs`` with ``batch`` samples, cut or repeated, in every tensor whose first dimension is the batch's."""
    size, spec = batch_size(inputs), spec_of(inputs, "inputs")
    index = torch.arange(batch) % size
    leaves = [leaf[index] if leaf.ndim and leaf.shape[0] == size else leaf for leaf in flatten(inputs, spec, "inputs")]
    return unflatten(leaves, spec)


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, its number, the load at this moment, and versions."""
    processor = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    versions = {}
    for name in ("torch", "onnxruntime", "openvino"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "processor": processor,
        "cpus": cpus(),
        "load": load,
        "system": platform.system(),
        "python": platform.python_version(),
        **versions,
    }


class _Log:
    """What has been measured so far, and why something was not."""

    def __init__(self) -> None:
        self.rows: dict[Key, list[tuple[float, ...]]] = {}
        self.memory: dict[Key, int | None] = {}
        self.skipped: dict[Key, str] = {}

    def attempt(self, name: str, batches: Sequence[int], threads: int, action: Callable[[], T]) -> T | None:
        """The value of ``action``; when it fails, None, and the candidate is skipped at these batch sizes."""
        try:
            return action()
        except Exception as error:  # a callable may raise anything; it must not end the measuring of the others
            why = error.given if isinstance(error, MultumError) else f"{type(error).__name__}: {message_of(error)}"
            self.skipped |= {(name, batch, threads): why for batch in batches}
            return None


def _in_turns(log: _Log, runners: Mapping[str, Runner], inputs: Any, setting: tuple[int, int], rounds: int, until: float) -> None:
    """Add a row of milliseconds for each runner to the log."""
    batch, threads = setting
    times: dict[str, list[float]] = {}
    for name, runner in runners.items():
        if (name, *setting) in log.skipped:
            continue
        memory = log.attempt(name, [batch], threads, functools.partial(runner.prepare, inputs))
        log.memory[(name, *setting)] = max(memory or 0, log.memory.get((name, *setting)) or 0) or None
        times[name] = []
    order = random.Random(len(log.rows))
    for number in range(rounds):
        running = [name for name in times if (name, *setting) not in log.skipped]
        for name in order.sample(running, len(running)):
            if seconds := log.attempt(name, [batch], threads, runners[name].sample):
                times[name].append(seconds * 1e3)
        if number and time.perf_counter() > until:  # two from each process make the six that an interval needs
            break
    for name, row in times.items():
        log.rows.setdefault((name, *setting), []).append(tuple(row))
