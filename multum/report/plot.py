"""The trade-off plot: the size of every candidate on a logarithmic axis against its score, as coordinates to draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .words import duration, size

WIDTH, HEIGHT = 720, 340
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 20, 46


def tradeoff(result: dict[str, Any], candidates: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Points, ticks and the target's lines in pixels; None when nothing was scored."""
    rows = [row for row in candidates if row.get("score") is not None]
    if not rows:
        return None
    original = next(row for row in rows if row["name"] == "original")
    x, xs = _logarithmic([row["bytes"] for row in rows])
    wanted = result["target"].get("max_drop")
    sign = 1 if result["higher_is_better"] else -1
    floor = None if wanted is None else original["score"] - sign * wanted
    y, ys = _linear([row["score"] for row in rows] + ([floor] if floor is not None else []))
    points = [
        {
            "x": x(row["bytes"]),
            "y": y(row["score"]),
            "kind": "original" if row is original else "chosen" if row.get("chosen") else "other",
            "title": f"{row['name']}: {size(row['bytes'])}, score {row['score']:.2f}, {duration(row['latency'])}",
        }
        for row in rows
    ]
    limit = result["limit"]
    return {
        "width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM,
        "points": sorted(points, key=lambda point: point["kind"] == "chosen"),
        "xs": xs, "ys": ys,
        "limit": None if limit is None else min(max(x(limit), LEFT), WIDTH - RIGHT),
        "floor": None if floor is None else y(floor),
    }  # fmt: skip


def _logarithmic(values: list[float]) -> tuple[Any, list[dict[str, Any]]]:
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = max(0.08 * (high - low), 0.08)
    low, high = low - margin, high + margin

    def place(value: float) -> float:
        return LEFT + (math.log10(max(value, 1e-9)) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    ticks = [factor * 10**power for power in range(math.floor(low), math.ceil(high) + 1) for factor in (1, 2, 5)]
    return place, [{"at": place(tick), "text": size(tick)} for tick in ticks if low <= math.log10(tick) <= high]


def _linear(values: list[float]) -> tuple[Any, list[dict[str, Any]]]:
    low, high = min(values), max(values)
    margin = max(0.08 * (high - low), 1e-3 * max(abs(high), 1.0))
    low, high = low - margin, high + margin

    def place(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= next(factor for factor in (5, 2, 1) if (high - low) / (step * factor) >= 3 or factor == 1)
    ticks = [step * index for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
    digits = max(0, -math.floor(math.log10(step)))
    return place, [{"at": place(tick), "text": f"{tick:.{digits}f}"} for tick in ticks]
