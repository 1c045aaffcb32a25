"""multum: a trained network goes in; the smallest and fastest one that keeps its accuracy comes out, with the evidence."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

# Where each public name lives; loaded when it is first used, so that importing multum costs next to nothing.
_PLACES = {
    "MultumError": "errors",
    "Task": "task",
    "load_task": "task",
    "Graph": "graph",
    "capture": "graph",
    "Step": "step",
    "Recipe": "step",
    "compress": "step",
    "save": "pack",
    "load": "pack",
    "pack": "pack",
    "unpack": "pack",
    "export": "export",
    "Session": "runtime",
    "bench": "runtime",
    "analyze": "analyze",
    "Target": "search",
    "search": "search",
    "run": "search",
    "report": "report",
}
_FAMILIES = ("prune", "factorize", "share", "quantize", "distill")

__all__ = [*_PLACES, *_FAMILIES]


class _Package(ModuleType):
    """Keeps `multum.search` and `multum.pack` the functions: importing the folder of that name would put the folder in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PLACES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _FAMILIES:
        return importlib.import_module(f".{name}", __name__)
    if name in _PLACES:
        return getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)
    raise AttributeError(f"module 'multum' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
