"""In which order the symbols of a tensor are visited: what is seen first should tell most about the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

BATCH = 1 << 16  # symbols; bounds the memory
_FIRST, _GROWTH, _YOUNG = 16, (6, 3), 1 << 14  # a batch is at least the first, and a part of what is known, the smaller part of little
_COARSE = 128  # and at least so small a part of the matrix
_SAMPLE, _PART = 1 << 18, 16  # at least so many symbols, and such a part of each row, are visited before the order is that of the memory
_TAPS, _NEAR = 128, 4  # positions in a kernel; neighbours that are looked at


def grid(shape: Sequence[int]) -> tuple[int, int, tuple[int, ...]]:
    """Output channels, input channels and kernel; a tensor that has no small kernel is a matrix, a vector one output channel."""
    kernel = tuple(shape[2:])
    if math.prod(kernel) > _TAPS:
        return math.prod(shape[:-1]), shape[-1], ()
    rows = shape[0] if len(shape) > 1 else 1
    return rows, math.prod(shape[:2]) // rows, kernel


@lru_cache(maxsize=64)
def order(kernel: tuple[int, ...]) -> list[tuple[int, list[tuple[int, float]]]]:
    """The positions of a kernel from the middle outwards, each with the nearest ones before it and their weights."""
    places = [np.unravel_index(i, kernel) for i in range(math.prod(kernel))]
    middle = sorted(range(len(places)), key=lambda i: sum((2 * int(x) - n + 1) ** 2 for x, n in zip(places[i], kernel, strict=True)))
    found = []
    for count, tap in enumerate(middle):
        squares = [sum(int(x - y) ** 2 for x, y in zip(places[tap], places[other], strict=True)) for other in middle[:count]]
        near = sorted(zip(middle, squares, strict=False), key=lambda pair: pair[1])[:_NEAR]
        found.append((tap, [(other, 1 / square**3) for other, square in near]))
    return found


def blocks(rows: int, columns: int, known: int) -> Iterator[tuple[slice, Ints]]:
    """Every place of a matrix once: batches of rows, and the columns [turns, rows] that are visited in them.

    Growing batches spread over the whole matrix until a part of each row is known; then comes one stripe of rows after the other.
    ``known`` is the number of symbols seen before.
    """
    stride = max(1, int(columns * 0.6180339887))
    while math.gcd(stride, columns) != 1:
        stride -= 1
    shift = max(1, int(columns * 0.7548776662))
    for turns, part in _turns(rows, columns, known):
        first = np.arange(part.start, part.stop, dtype=np.int64) * shift % columns
        column = (np.arange(turns.start, turns.stop, dtype=np.int64) * stride % columns)[:, None] + first
        # Of a number and the number less the modulus, the smaller when a negative one counts as huge.
        yield part, np.minimum(column.view(np.uint64), (column - columns).view(np.uint64)).view(np.int64)


def _turns(rows: int, columns: int, known: int) -> Iterator[tuple[slice, slice]]:
    turn = row = 0
    while turn < columns and (turn * rows < _SAMPLE or _PART * turn < columns):
        seen = known + turn * rows + row
        size = min(BATCH, max(_FIRST, rows * columns // _COARSE, seen // _GROWTH[seen >= _YOUNG]))
        if size < rows or row:
            end = min(rows, row + size)
            yield slice(turn, turn + 1), slice(row, end)
            turn, row = (turn + 1, 0) if end == rows else (turn, end)
        else:
            end = min(columns, turn + size // rows)
            yield slice(turn, end), slice(0, rows)
            turn = end
    height = max(1, min(rows, BATCH // max(1, columns - turn)))
    for row in range(0, rows, height):
        start = turn
        while start < columns:
            end = min(columns, start + max(1, min(3 * start, BATCH // height)))
            yield slice(start, end), slice(row, min(rows, row + height))
            start = end
