"""Every step as data: what it does, where it comes from, what it needs, and its options."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

from ..step import Step, methods


def catalog() -> list[dict[str, Any]]:
    """One row for each step, in the order in which they may stand in a recipe."""
    found = sorted(methods().items(), key=lambda item: (item[1].stage or 9, item[0]))
    return [_row(name, kind) for name, kind in found]


def _row(name: str, kind: type[Step]) -> dict[str, Any]:
    text = inspect.cleandoc(kind.__doc__ or "")
    return {
        "name": name,
        "stage": kind.stage.name.lower() if kind.stage else "training",
        "needs": list(kind.needs),
        "source": text.splitlines()[0] if text else "",
        "options": [{"name": f.name, "default": f.default, "help": f.metadata.get("help", "")} for f in fields(kind)],
    }
