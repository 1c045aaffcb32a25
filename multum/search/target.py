"""`Target`: what the user wants of the compressed model, and how sizes are written."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import TargetError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_EXPECTED_SIZE = "a share of the original file ('1/10' or 0.1), a ratio ('10x'), or a size ('200KB', '2MB')"


@dataclass(frozen=True)
class Target:
    """What the compressed model must reach. What is not given is not asked.

    `size` is a share of the original's fp32 file (`"1/10"`, `0.1`), a ratio (`"10x"`), or a number of bytes with its unit
    (`"200KB"`, `"2MB"`; K is 1000, Ki is 1024). `speed` is how many times faster than the best fp32 engine one sample must
    be (`2` or `"2x"`). `max_drop` is in the unit of the task's score. `minutes` ends the search; the last measurement comes
    on top. Raises TargetError for anything else.
    """

    size: str | float | None = None
    speed: str | float | None = None
    max_drop: float | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.size is not None:
            _size(self.size)
        if self.speed is not None:
            object.__setattr__(self, "speed", _speed(self.speed))
        if self.max_drop is not None:
            object.__setattr__(self, "max_drop", _number(self.max_drop, "drop", "0 or more, in the unit of the score, such as 0.5", 0.0))
        if self.minutes is not None:
            object.__setattr__(self, "minutes", _number(self.minutes, "number of minutes", "a number above 0, such as 10", 1e-9))

    @property
    def empty(self) -> bool:
        """Whether nothing is asked of the model itself."""
        return self.size is None and self.speed is None and self.max_drop is None

    def limit(self, original: int) -> int | None:
        """The largest file, in bytes, that meets the size when the original's file has `original` bytes."""
        if self.size is None:
            return None
        share, count = _size(self.size)
        return count if share is None else math.floor(original * share + 1e-9)

    def to_data(self) -> dict[str, Any]:
        """What was asked, out of JSON's types."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def _size(given: str | float) -> tuple[float | None, int]:
    """A share of the original, or None and a number of bytes."""
    text = str(given).strip()
    if fraction := re.fullmatch(r"(\d+(?:\.\d+)?)\s*/\s*(\d+(?:\.\d+)?)", text):
        above, below = map(float, fraction.groups())
        share = above / below if below else math.inf
    elif ratio := re.fullmatch(r"(\d+(?:\.\d+)?)\s*[xX]", text):
        share = 1 / float(ratio[1]) if float(ratio[1]) else math.inf
    elif amount := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGkmg]?[iI]?[bB])", text):
        count = int(float(amount[1]) * _UNITS[amount[2].upper()])
        if count < 1:
            raise TargetError(f"The size {text!r} is no bytes at all.", _EXPECTED_SIZE)
        return None, count
    else:
        share = _share(text)
    if not 0 < share <= 1:
        raise TargetError(
            f"The size {text!r} is not smaller than the original.", _EXPECTED_SIZE, "write '1/10' for a tenth of the original"
        )
    return share, 0


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        raise TargetError(f"The size {text!r} cannot be read.", _EXPECTED_SIZE) from None
    if share <= 0 or not math.isfinite(share):
        raise TargetError(f"The size {text!r} is not a size.", _EXPECTED_SIZE)
    if share >= 1:
        raise TargetError(f"The size {text!r} is ambiguous.", _EXPECTED_SIZE, f"write '1/{text}', '{text}x', '{text}KB' or '{text}MB'")
    return share


def _speed(given: str | float) -> float:
    text = str(given).strip().removesuffix("x").removesuffix("X")
    return _number(text, "speed", "times faster than the original, 1 or more, such as 2 or '2x'", 1.0)


def _number(given: Any, what: str, expected: str, least: float) -> float:
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value) or value < least or isinstance(given, bool):
        raise TargetError(f"The {what} {given!r} cannot be used.", expected)
    return value
