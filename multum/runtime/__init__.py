"""Running exported models and measuring them: sessions, and paired, interleaved benchmarks."""

from __future__ import annotations

import importlib
from typing import Any

# Loaded when first used: the processes that measure import this package, and must not wait for torch.
_PLACES = {
    "Session": "session",
    "Bench": "benchmark",
    "Verdict": "benchmark",
    "bench": "benchmark",
    "best": "benchmark",
    "verdict": "benchmark",
}

__all__ = [*_PLACES]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
