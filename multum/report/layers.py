"""The bars of the report: what each layer was and is."""

from __future__ import annotations

import math
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


def limit_bars(found: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The largest tensors that have a bound: coded size, entropy and bound, in percent of the longest, and bits per number in words."""
    rows = [row for row in (found or {}).get("tensors", ()) if row["bound"] is not None and row["entropy"] is not None]
    largest = sorted(rows, key=lambda row: -row["bytes"])[:MOST]
    longest = max((max(row["bytes"], row["entropy"], row["bound"]) for row in rows), default=1)
    drawn = []
    for row in (row for row in rows if row in largest):
        sizes = row["bytes"], row["entropy"], row["bound"]
        bits = " / ".join(f"{8 * value / math.prod(row['shape']):.2f}" for value in sizes)
        drawn.append({"name": row["name"], "lengths": [100 * value / longest for value in sizes], "text": bits})
    return drawn


def _value(side: dict[str, Any] | None, key: str) -> float:
    return float((side or {}).get(key) or 0.0)
