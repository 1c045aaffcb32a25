"""The bars of the report: what each layer was and is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .words import amount, duration, size

MEASURES = (("bytes", "Bytes", size), ("parameters", "Parameters", amount), ("macs", "MACs", amount), ("ms", "Time in PyTorch", duration))
MOST = 60  # layers shown; the others are summed up in one row


def bars(layers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each measure the rows to draw: the layer's name, lengths in percent of the longest, and the numbers in words."""
    found = []
    for key, title, text in MEASURES:
        rows = [(row["name"], _value(row["before"], key), _value(row["after"], key)) for row in layers]
        rows = [row for row in rows if row[1] or row[2]]
        longest = max((value for _, *pair in rows for value in pair), default=0.0)
        if not longest:
            continue
        if len(rows) > MOST:
            largest = set(sorted(range(len(rows)), key=lambda i: -rows[i][1])[: MOST - 1])
            rest = [row for i, row in enumerate(rows) if i not in largest]
            rows = [row for i, row in enumerate(rows) if i in largest]
            rows.append((f"{len(rest)} smaller layers", sum(row[1] for row in rest), sum(row[2] for row in rest)))
            longest = max(longest, *rows[-1][1:])
        drawn = [
            {"name": name, "before": 100 * a / longest, "after": 100 * b / longest, "text": f"{text(a)} → {text(b)}"} for name, a, b in rows
        ]
        found.append({"key": key, "title": title, "rows": drawn})
    return found


def _value(side: dict[str, Any] | None, key: str) -> float:
    return float((side or {}).get(key) or 0.0)
