"""Which candidate is faster, measured in turns: a round times each one once, in random order, so what disturbs one disturbs all."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from multum.analyze.statistics import median_interval
from multum.errors import MultumError, near
from multum.graph.capture import arguments
from multum.graph.spec import flatten, spec_of, unflatten
from multum.runtime.candidate import Runner, opener
from multum.runtime.engines import cpus, first_line
from multum.runtime.session import Session

_PROCESSES = 1.03
"""Two processes with one and the same file differ by up to about 3 % for as long as they live, because of where their memory lies."""

Candidate = Session | Callable[..., Any] | str | PathLike[str]


@dataclass(frozen=True)
class Timing:
    """One candidate at one batch size and number of threads.

    ``rounds``: milliseconds per call, one for each round; the same place in two timings of the same setting is the same round.
    ``memory``: peak bytes above the process with nothing but the engine imported; None for a callable.
    """

    candidate: str
    batch: int
    threads: int
    rounds: tuple[float, ...]
    memory: int | None

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def to_dict(self) -> dict[str, Any]:
        p10, p90 = np.percentile(self.rounds, [10, 90]).tolist()
        numbers = {"median": self.median, "p10": p10, "p90": p90, "rounds": list(self.rounds)}
        return {"candidate": self.candidate, "batch": self.batch, "threads": self.threads, "memory": self.memory, "milliseconds": numbers}


@dataclass(frozen=True)
class Bench:
    """What was measured. ``skipped`` has the reason for every timing that is missing, by candidate, batch size and threads."""

    timings: tuple[Timing, ...]
    skipped: dict[tuple[str, int, int], str]
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

    The interval is that of the median of the paired rounds, wider by what two processes with one and the same file differ.
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
    ``threads``: 0 is all. ``seconds`` are shared by all settings; each gets its ``rounds`` or fewer, but at least one.
    A session or file runs in a process of its own, which is stopped while it is not its turn; a callable runs here.
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
    timings: list[Timing] = []
    skipped: dict[tuple[str, int, int], str] = {}
    end = time.perf_counter() + seconds
    left = len(batches) * len(counts)
    for count in counts:
        with contextlib.ExitStack() as stack:
            runners: dict[str, Runner] = {}
            for name in openers:
                try:
                    runners[name] = openers[name](count)
                    stack.callback(runners[name].close)
                except MultumError as error:
                    skipped |= {(name, batch, count): error.given for batch in batches}
            for batch in batches:
                until = time.perf_counter() + (end - time.perf_counter()) / left
                left -= 1
                found, failed = _in_turns(runners, resized(inputs, batch), rounds, until)
                timings += [Timing(name, batch, count, times, memory) for name, (times, memory) in found.items()]
                skipped |= {(name, batch, count): why for name, why in failed.items()}
    return Bench(tuple(timings), skipped, machine())


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
    ratios = [b / a for a, b in zip(one.rounds, other.rounds, strict=True)]
    ratio, interval = statistics.median(ratios), median_interval(ratios)
    if interval is None:
        return Verdict(False, ratio, None, None, f"too few rounds {where}: {len(ratios)}, an interval needs 6")
    low, high = interval[0] / _PROCESSES, interval[1] * _PROCESSES
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


Found = dict[str, tuple[tuple[float, ...], int | None]]


def _in_turns(runners: Mapping[str, Runner], inputs: Any, rounds: int, until: float) -> tuple[Found, dict[str, str]]:
    """Milliseconds per round and peak memory of each runner, and why one failed."""
    memory: dict[str, int | None] = {}
    failed: dict[str, str] = {}
    times: dict[str, list[float]] = {}

    def attempt(action: Callable[[str], None], name: str) -> None:
        try:
            action(name)
        except Exception as error:  # a callable may raise anything; it must not end the measuring of the others
            failed[name] = error.given if isinstance(error, MultumError) else f"{type(error).__name__}: {first_line(error)}"

    def prepare(name: str) -> None:
        memory[name] = runners[name].prepare(inputs)
        times[name] = []

    def sample(name: str) -> None:
        times[name].append(runners[name].sample() * 1e3)

    for name in runners:
        attempt(prepare, name)
    order = random.Random(0)
    for _ in range(rounds):
        running = [name for name in times if name not in failed]
        for name in order.sample(running, len(running)):
            attempt(sample, name)
        if time.perf_counter() > until:
            break
    return {name: (tuple(rounds), memory[name]) for name, rounds in times.items() if name not in failed}, failed
