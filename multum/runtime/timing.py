"""Timing a callable, so that a model of 0.1 ms is as steady as one of 50 ms."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

_SAMPLE = 0.002  # seconds; below this the clock and the scheduler show
_WARM = 0.05  # seconds
_GROUP = Path("/proc/self/autogroup")  # the scheduler's share of this process's session
_COLD = 0.02  # seconds; a call longer than this does not feel the caches that another process left behind


def warm(call: Callable[[], object]) -> float:
    """Call until the first, slow calls are over; the seconds of the fastest."""
    best, start = math.inf, perf_counter()
    while best == math.inf or perf_counter() - start < _WARM:
        best = min(best, sample(call, 1))
    return best


def repeats(seconds: float) -> int:
    """How many calls of so many seconds make one sample."""
    return max(1, math.ceil(_SAMPLE / max(seconds, 1e-7)))


def sample(call: Callable[[], object], count: int) -> float:
    """Seconds per call, over ``count`` calls in a row."""
    start = perf_counter()
    for _ in range(count):
        call()
    return (perf_counter() - start) / count


def turn(call: Callable[[], object], seconds: float) -> float:
    """One sample of a callable that has been idle, where ``seconds`` is about what a call takes."""
    if seconds < _COLD:
        sample(call, min(repeats(seconds), 5))
    return sample(call, repeats(seconds))


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Put this process's session before others, where the system allows it.

    Linux gives every session the same share of the processors (sched_autogroup), whatever the niceness of its processes: next to a busy
    session, times read 2 to 10 times too long.
    """
    before = ""
    with contextlib.suppress(OSError):
        before = "".join(_GROUP.read_text().split()[-1:])  # empty for a process that is in no such group
        _GROUP.write_text("-20")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if before:
                _GROUP.write_text(before)
