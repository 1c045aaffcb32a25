"""Coding of the symbols of large tensors, several at a time: contexts of whole blocks instead of single symbols.

Output channels, input channels and positions in the kernel are put into classes by the magnitudes seen in them so far, and where a
class of rows meets a class of columns all symbols have one context: no prediction is made for a single symbol. A tensor is coded in a
few rectangles, each about as large as all before it, from every sixteenth row and column on; classes and histograms are learned between
them. Where symbols are few, two or four neighbours of a block are one symbol to the range coder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from . import places
from .histograms import ZERO, Exchange, Histograms, Table

Array = NDArray[Any]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
_LEAST = 1 << 16  # symbols that make a tensor large
_APART, _EACH = 16, 8  # the first rectangles have every 16th row and column, but at least so many
_FIRST, _GROWTH, _BATCH = 1 << 7, 2, 1 << 18  # symbols in a first piece, factor to the next, and the most, which bounds the memory
_WIDE = 2  # times as large may whole rows be
_TRUST = 5  # symbols that the prediction for a channel outweighs
_SPREAD = 5  # octaves that channels may differ from the mean
_LEARNED = 1 << 20  # symbols after which nothing new is learned
_JOINT = 1024  # symbols that several make together


def large(sizes: Sequence[int]) -> bool:
    """Whether what is coded, tensors of so many symbols, is one large one."""
    return len(sizes) == 1 and sizes[0] >= _LEAST


def kernel(shape: Sequence[int]) -> bool:
    """Whether a tensor has positions in a kernel, of which neighbours tell of each other."""
    return len(places.order(places.grid(shape)[2])) > 1


def transfer(flat: Array, low: int, shape: Sequence[int], histograms: Histograms, exchange: Exchange, encode: bool) -> None:
    """Moves the symbols of a tensor, given flat, through a coder: encodes them, or fills them in."""
    rows, columns, kernel = places.grid(shape)
    cube = flat.reshape(rows, columns, -1)
    way = (_Split if histograms.flags else _Whole)(cube, low, histograms, exchange, encode)
    for index, (tap, _) in enumerate(places.order(kernel)):
        way.begin(tap)
        for across, down in _rectangles(rows, columns) if index == 0 else _pieces(np.arange(rows), np.arange(columns), _BATCH, columns):
            few = way.known.count < _LEARNED
            # In the last turn nobody asks for these rows again.
            way.move(across, down, few, few or 2 * down.size < columns)
    way.close()


class _Whole:
    """Moves symbols as they are."""

    def __init__(self, cube: Array, low: int, histograms: Histograms, exchange: Exchange, encode: bool):
        self.cube, self.low, self.histograms, self.encode = cube, low, histograms, encode
        self.known, self.table = _Known(cube.shape, histograms.mean), histograms.table
        self.magnitudes = histograms.magnitudes.astype(np.int32)
        self.runs = _Runs(histograms.table, np.arange(low, low + self.magnitudes.size), cube.dtype, exchange)

    def begin(self, tap: int) -> None:
        self.tap, self.matrix = tap, self.cube[:, :, tap]

    def move(self, across: Ints, down: Ints, few: bool, learns: bool) -> None:
        across, down, ordered = _move(
            self.matrix, across, down, self.known.classes(across, down, self.tap, self.table), self.runs, self.encode, few
        )
        if learns:
            self.known.learn(across, down, self.tap, self.magnitudes.take(ordered.astype(np.int64) - self.low))

    def close(self) -> None:
        self.histograms.close(self.known.mean, 0.0)


class _Split:
    """Moves two decisions for each symbol: whether it is zero, and if not, its value."""

    def __init__(self, cube: Array, low: int, histograms: Histograms, exchange: Exchange, encode: bool):
        assert histograms.flags is not None
        assert histograms.nonzero is not None
        self.cube, self.low, self.histograms, self.encode = cube, low, histograms, encode
        self.known, self.others = _Known(cube.shape, histograms.mean / histograms.nonzero * ZERO), _Known(cube.shape, histograms.nonzero)
        levels = np.arange(low, low + histograms.magnitudes.size)
        self.magnitudes, self.zero = histograms.magnitudes, levels[histograms.zero]
        self.flags = _Runs(histograms.flags, np.arange(2), np.dtype(np.uint8), exchange)
        self.runs = _Runs(histograms.table, np.delete(levels, histograms.zero), cube.dtype, exchange)

    def begin(self, tap: int) -> None:
        self.tap, self.matrix = tap, self.cube[:, :, tap]
        self.plane = (self.matrix != self.zero).view(np.uint8) if self.encode else np.empty(self.matrix.shape, np.uint8)
        if not self.encode:
            self.matrix[:] = self.zero

    def move(self, across: Ints, down: Ints, few: bool, learns: bool) -> None:
        classes = self.known.classes(across, down, self.tap, self.flags.table)
        across, down, ordered = _move(self.plane, across, down, classes, self.flags, self.encode, few)
        rows, columns = np.divmod(np.flatnonzero(ordered), down.size)
        table = self.runs.table
        of_rows, of_columns, base = self.others.classes(across, down, self.tap, table)
        contexts = table.contexts(base + of_rows[rows] + of_columns[columns]).astype(np.int16)
        order = np.argsort(contexts, kind="stable")
        rows, columns = across[rows[order]], down[columns[order]]
        values = self.matrix[rows, columns] if self.encode else np.empty(rows.size, self.matrix.dtype)
        present, sizes = np.unique(contexts, return_counts=True)
        ends = np.cumsum([0, *sizes])
        for i, weights in enumerate(table.weights(present.astype(np.int64))):
            run = values[ends[i] : ends[i + 1]]
            if self.encode:
                self.runs.encode(run, int(present[i]), weights, few)
            else:
                run[:] = self.runs.decode(run.size, int(present[i]), weights, few)
        if not self.encode:
            self.matrix[rows, columns] = values
        if learns:
            self.known.learn(across, down, self.tap, ordered.astype(np.int32) * ZERO)
            self.others.learn_some(rows, columns, self.tap, self.magnitudes.take(values.astype(np.int64) - self.low))

    def close(self) -> None:
        self.histograms.close(self.known.mean * self.others.mean / ZERO, self.others.mean)


def _move(
    matrix: Array, across: Ints, down: Ints, classes: tuple[Ints, Ints, int], runs: _Runs, encode: bool, learns: bool
) -> tuple[Ints, Ints, Array]:
    """Moves a rectangle, ordered by the classes of its rows and columns; where they meet is a block of one context. Gives it as ordered."""
    orders = np.argsort(classes[0], kind="stable"), np.argsort(classes[1], kind="stable")
    across, down = across[orders[0]], down[orders[1]]
    (row_classes, heights), (column_classes, widths) = (np.unique(c, return_counts=True) for c in classes[:2])
    tops, lefts = np.cumsum([0, *heights]), np.cumsum([0, *widths])
    ordered = matrix[across].take(down, 1) if encode else np.empty((across.size, down.size), matrix.dtype)
    contexts = runs.table.contexts(classes[2] + row_classes[:, None] + column_classes)
    pairs = np.argsort(contexts, None, kind="stable")
    present, counts = np.unique(contexts, return_counts=True)
    where = zip(*(part.tolist() for part in np.divmod(pairs, len(widths))), strict=True)
    blocks = [ordered[tops[i] : tops[i + 1], lefts[j] : lefts[j + 1]] for i, j in where]
    last = 0
    for context, count, weights in zip(present.tolist(), counts.tolist(), runs.table.weights(present), strict=True):
        here, last = blocks[last : last + count], last + count
        if encode:
            runs.encode(np.concatenate([block.reshape(-1) for block in here]), context, weights, learns)
            continue
        found, start = runs.decode(sum(block.size for block in here), context, weights, learns), 0
        for block in here:
            block[:] = found[start : start + block.size].reshape(block.shape)
            start += block.size
    if not encode:  # takes and a choice are several times faster than to put rows and columns at once
        back = np.full(matrix.shape[1], -1)
        back[down] = np.arange(down.size)
        matrix[across] = np.where(back < 0, matrix[across], ordered.take(back, 1))
    return across, down, ordered


class _Runs:
    """Moves runs of symbols of one context, several as one symbol of the coder where that has not too many; levels ascend."""

    def __init__(self, table: Table, levels: Ints, dtype: np.dtype[Any], exchange: Exchange):
        self.table, self.levels, self.exchange = table, levels.astype(dtype), exchange
        self.kinds = table.values.size
        self.together = next(n for n in (8, 4, 2, 1) if n == 1 or self.kinds**n <= _JOINT)
        self.low = int(levels[0])
        self.index = np.zeros(int(levels[-1]) - self.low + 1, np.int32)
        self.index[levels - self.low] = np.arange(levels.size)
        indices = np.indices((self.kinds,) * self.together).reshape(self.together, -1)
        self.inside = np.stack([(indices == kind).sum(0) for kind in range(self.kinds)], -1).astype(np.float64)  # of each kind in several
        several = np.ascontiguousarray(self.levels[indices].T)
        size = several.itemsize * self.together
        self.packed = several.view(f"u{size}" if size <= 8 else f"V{size}").reshape(-1)

    def encode(self, values: Array, context: int, weights: Floats, learns: bool) -> None:
        symbols = self.index.take(values.astype(np.int64) - self.low)
        whole = symbols.size - symbols.size % self.together
        joint = symbols[: whole : self.together]
        for place in range(1, self.together):
            joint = joint * self.kinds + symbols[place : whole : self.together]
        for run, times in ((joint, self.together), (symbols[whole:], 1)):
            if run.size:
                self._pass(np.ascontiguousarray(run), run.size, times, context, weights, learns)

    def decode(self, count: int, context: int, weights: Floats, learns: bool) -> Array:
        rest = count % self.together
        parts = []
        if count > rest:
            joint = self._pass(None, count // self.together, self.together, context, weights, learns)
            parts.append(self.packed.take(joint).view(self.levels.dtype))
        if rest:
            parts.append(self.levels.take(self._pass(None, rest, 1, context, weights, learns)))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _pass(
        self, symbols: NDArray[np.int32] | None, count: int, times: int, context: int, weights: Floats, learns: bool
    ) -> NDArray[np.int32]:
        joint = weights
        while joint.size < self.kinds**times:
            joint = np.multiply.outer(joint, joint).reshape(-1)
        found = self.exchange(symbols, count, constriction.stream.model.Categorical(joint, perfect=False))
        if learns:
            seen = np.bincount(found, minlength=joint.size)
            # Sums of whole numbers, exact in any order.
            self.table.own[context] += seen if times == 1 else (seen.astype(np.float64) @ self.inside).astype(np.int64)
        return found


def _rectangles(rows: int, columns: int) -> Iterator[tuple[Ints, Ints]]:
    """Every place of a matrix once: some columns, some rows, then the rest, in two turns of columns."""
    (top, *below), (left, *right) = _parts(rows), _parts(columns)
    yield from _pieces(np.arange(rows), left, _FIRST, columns)
    yield from _pieces(top, np.concatenate(right), _BATCH, columns)
    for down in right:
        yield from _pieces(np.concatenate(below), down, rows * columns // _APART, columns)


def _parts(count: int) -> tuple[Ints, Ints, Ints]:
    """Every sixteenth of so many, every fourth of the rest, and what then is left; larger parts where they are few."""
    apart = max(1, min(_APART, count // _EACH))
    first, second = np.arange(count) % apart == 0, np.arange(count) % max(1, apart // 4) == 0
    return np.flatnonzero(first), np.flatnonzero(second & ~first), np.flatnonzero(~second & ~first)


def _pieces(across: Ints, down: Ints, size: int, width: int) -> Iterator[tuple[Ints, Ints]]:
    """A rectangle in pieces, the first of about `size`, then larger ones, of bounded size, also that of their rows in a matrix so wide."""
    row = 0
    while row < across.size and down.size:
        height = max(1, min(size, _BATCH, _WIDE * _BATCH * down.size // width) // down.size)
        for column in range(0, down.size, _BATCH):
            yield across[row : row + height], down[column : column + _BATCH]
        row, size = row + height, _GROWTH * size


class _Known:
    """Sums of magnitudes and counts of one tensor, by row, column and position."""

    def __init__(self, shape: tuple[int, ...], mean: float):
        self.sum, self.count = 4 * mean, 4
        self.sums, self.counts = [np.zeros(n, np.int64) for n in shape], [np.zeros(n, np.int64) for n in shape]
        # What a single symbol has to itself says nothing.
        self.told = shape[1] * shape[2] > 1, shape[0] * shape[2] > 1, True

    @property
    def mean(self) -> float:
        return float(self.sum / self.count)

    def _steps(self, of: int, part: Any, steps: int) -> Ints:
        """How far groups are from the mean, in parts of an octave."""
        factor = (self.sums[of][part] + _TRUST * self.mean) / ((self.counts[of][part] + _TRUST) * self.mean)
        return _octaves(factor, steps, _SPREAD) if self.told[of] else np.zeros(factor.size, np.int64)

    def classes(self, across: Ints, down: Ints, tap: int, table: Table) -> tuple[Ints, Ints, int]:
        """The classes of rows and of columns, in steps from the mean, and the class of the mean."""
        base = _octaves(np.array([self.mean]), table.steps, 64) + self._steps(2, slice(tap, tap + 1), table.steps)
        return self._steps(0, across, table.steps), self._steps(1, down, table.steps), int(base[0])

    def learn(self, across: Ints, down: Ints, tap: int, magnitudes: Array) -> None:
        """Learns a rectangle."""
        for of, part, axis in ((0, across, 1), (1, down, 0)):
            self.sums[of][part] += magnitudes.sum(axis, dtype=np.int64)
            self.counts[of][part] += magnitudes.shape[axis]
        self._learn_all(tap, magnitudes)

    def learn_some(self, rows: Ints, columns: Ints, tap: int, magnitudes: Ints) -> None:
        """Learns single symbols."""
        for of, part in ((0, rows), (1, columns)):
            np.add.at(self.sums[of], part, magnitudes)
            np.add.at(self.counts[of], part, 1)
        self._learn_all(tap, magnitudes)

    def _learn_all(self, tap: int, magnitudes: Array) -> None:
        total = int(magnitudes.sum(dtype=np.int64))
        self.sums[2][tap] += total
        self.counts[2][tap] += magnitudes.size
        self.sum += total
        self.count += magnitudes.size


def _octaves(values: Floats, steps: int, most: int) -> Ints:
    """The nearest step of a logarithm that is linear within an octave, the bits of a positive double; at most so many octaves from 1."""
    found: Ints = ((values.view(np.int64) + (1 << (51 - steps))) >> (52 - steps)) - (1023 << steps)
    return np.clip(found, -most << steps, most << steps)
