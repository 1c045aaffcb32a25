"""Numbers in words: sizes, amounts, and the sentences that say what a result means."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any


def size(count: float) -> str:
    """Bytes with three digits: `45.2 KB`. K is 1000."""
    return _scaled(count, ("B", "KB", "MB", "GB"))


def amount(count: float) -> str:
    """A count with three digits: `272 k`, `31.2 M`."""
    return _scaled(count, ("", "k", "M", "G"))


def _scaled(count: float, units: tuple[str, ...]) -> str:
    index = 0
    while abs(count) >= 999.5 and index < len(units) - 1:
        count, index = count / 1000, index + 1
    digits = 2 if abs(count) < 9.995 else 1 if abs(count) < 99.95 else 0
    return f"{count:.{digits if index else 0}f} {units[index]}".strip()


def duration(ms: float) -> str:
    """Milliseconds with three digits, in the unit that suits."""
    return f"{ms * 1000:.3g} µs" if ms < 0.1 else f"{ms:.3g} ms" if ms < 1000 else f"{ms / 1000:.3g} s"


def spread(row: Mapping[str, Any], before: str = "") -> str:
    """The bounds of a ratio; nothing when there were too few rounds for them."""
    return "" if row["low"] is None or row["high"] is None else f"{before}{row['low']:.2f} to {row['high']:.2f}x"


def tiles(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The three numbers: what each is, from what to what, what was asked, and whether that is met (None: not asked)."""
    target, before, after = result["target"], result["original"], result["compressed"]
    ratio, speed, drop = result["ratios"]["size"], result["ratios"]["speed"], result["drop"]

    def tile(key: str, title: str, value: str, change: str, detail: str, asked: str) -> dict[str, Any]:
        named = {"key": key, "title": title, "value": value, "change": change, "detail": detail, "asked": asked or None}
        return named | {"met": key not in result["missed"] if asked else None}

    sizes = f"{size(before['bytes'])} → {size(after['bytes'])}"
    asked = f"asked: {target['size']}" if "size" in target else ""
    rows = [tile("size", "smaller", f"{ratio:.1f}x", sizes, "the file, against the original's fp32 safetensors", asked)]
    times = f"{duration(before['latency']['median'])} → {duration(after['latency']['median'])}"
    detail = f"one sample, in turns with the original on {speed['baseline']}{spread(speed, '; 95 % within ')}"
    asked = f"asked: {target['speed']:g}x" if "speed" in target else ""
    rows.append(tile("speed", "faster" if speed["ratio"] >= 1 else "the speed", f"{speed['ratio']:.2f}x", times, detail, asked))
    if drop is not None:
        bound = "" if drop["bound"] is None else f"; at most {drop['bound']:.2f} with 95 % confidence"
        title, scores = "points lost" if drop["points"] >= 0 else "points gained", f"{before['score']:.2f} → {after['score']:.2f}"
        asked = f"allowed: {target['max_drop']:g}" if "max_drop" in target else ""
        rows.append(tile("drop", title, f"{abs(drop['points']):.2f}", scores, f"{drop['part']} data, on the deployed file{bound}", asked))
    return rows


def statistics(result: Mapping[str, Any]) -> str:
    """What the drop means, in one sentence."""
    drop = result["drop"]
    if drop is None:
        return "The task has no validation or test data, so nothing was scored."
    part, points, bound = drop["part"], drop["points"], drop["bound"]
    if bound is None:
        return f"The score is one number for all of the {part} data, so its drop of {points:.2f} points has no confidence bound."
    where = f"{drop['n']:,} samples of the {part} data".replace(",", " ")
    lost = f"lost {points:.2f}" if points >= 0 else f"gained {-points:.2f}"
    pairs = ""
    if drop["discordant"] is not None:
        pairs = f"; original and compressed score differently on {drop['discordant']} of them (p = {drop['p']:.2g})"
    return f"On {where} the compressed file {lost} points; with 95 % confidence the loss is at most {bound:.2f}{pairs}."


def steps(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each step did, with the layers it left alone grouped by the reason."""
    rows = []
    for record in records:
        reasons: dict[str, list[str]] = defaultdict(list)
        for layer, reason in record["skipped"].items():
            reasons[reason].append(layer)
        before, after = record["parameters"]
        rows.append(
            {
                "name": record["step"],
                "options": ", ".join(f"{key} = {value}" for key, value in record["options"].items()) or "defaults",
                "changed": len(record["changes"]),
                "parameters": f"{amount(before)} → {amount(after)}" if before != after else f"{amount(after)}",
                "seconds": record["seconds"],
                "measured": {key: _short(value) for key, value in record["measured"].items() if isinstance(value, int | float | str)},
                "skipped": sorted(reasons.items()),
            }
        )
    return rows


def _short(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
