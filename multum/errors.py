"""Every error that multum raises. Each message says what was given, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MultumError(Exception):
    """Base of all errors of the package."""

    def __init__(self, given: str, expected: str = "", do: str = ""):
        self.given, self.expected, self.do = given, expected, do
        parts = (given, expected and f"Expected: {expected}", do and f"Do: {do}")
        super().__init__("\n".join(part for part in parts if part))


class TaskError(MultumError):
    """The task file or what it returns cannot be used."""


class CaptureError(MultumError):
    """The model cannot be captured as a graph."""


class GraphError(MultumError):
    """A graph is inconsistent, or an edit of it is not possible."""


class StepError(MultumError):
    """A step's options, place in the recipe or requirements are wrong, or it changed nothing."""


class TargetError(MultumError):
    """The target cannot be read or makes no sense."""


class TrainError(MultumError):
    """Training cannot start or had to stop."""


class FileError(MultumError):
    """A file is missing, damaged or hostile, or cannot be written."""


class ExportError(MultumError):
    """The exported model fails, or computes something else than the graph."""


class MissingExtra(MultumError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs the package '{package}', which is not installed.", do=f'pip install "multum[{extra}]"')


def near(name: str, known: Iterable[str], count: int = 3) -> str:
    """The names in ``known`` that come closest to ``name``, as a phrase for an error message."""
    names = list(known)
    close = difflib.get_close_matches(name, names, count, 0.4) or names[:count]
    return ", ".join(repr(n) for n in close) or "nothing"
