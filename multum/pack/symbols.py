"""Context-modelled entropy coding of symbols: what the coder learns from a tensor, encoder and decoder learn alike.

A tensor is seen as output channels x input channels x positions in the kernel. It is coded position by position, from the middle of
the kernel outwards, and within a position in growing batches that spread over all channels. Before each batch the magnitude of every
symbol in it is predicted from what is known so far of its output channel, input channel, position, and of its neighbours in the kernel;
the prediction, and the sign of the neighbours, select one of some hundred adaptive histograms, and a range coder does the rest. No table
is stored. Predictions are sums of integers joined by IEEE additions, products and quotients, which every machine rounds alike.

Where zeros abound a symbol is two decisions: whether it is zero, and if not, its value. Their contexts differ, for how many weights of
a channel were pruned says little of how large the others are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from . import bulk, places
from .histograms import ZERO, Exchange, Histograms

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_TRUST, _TRUST_NEAR = 16, 1  # symbols that a prediction outweighs: of a channel, of neighbours


class _Known:
    """Sums of magnitudes and counts of one tensor, by output channel, input channel and position."""

    def __init__(self, rows: int, columns: int, taps: int, mean: float):
        self.sum, self.count, size = 4 * mean, 4, rows * columns * taps
        # What has a single group, or a group for each symbol, says nothing; to keep very many is slow.
        self.told = 1 < rows < size, 1 < columns < min(size, places.BATCH), 1 < taps < size
        groups = [n if told else 1 for n, told in zip((rows, columns, taps), self.told, strict=True)]
        self.sums, self.counts = [np.zeros(n, np.int64) for n in groups], [np.zeros(n, np.int64) for n in groups]

    def expect(self, part: slice, column: Ints, tap: int) -> Floats:
        """The expected magnitudes in a block [turns, rows]."""
        overall = self.sum / self.count
        rows, columns, taps = (
            (s[of] + _TRUST * overall) / ((c[of] + _TRUST) * overall) if told else np.ones(1)
            for s, c, told, of in zip(self.sums, self.counts, self.told, (part, slice(None), slice(tap, tap + 1)), strict=True)
        )
        factors = columns[column] if self.told[1] else np.ones(column.shape)
        factors *= rows * (overall * taps)
        return factors

    def learn(self, part: slice, column: Ints, tap: int, magnitudes: Ints) -> None:
        """Learns a block of symbols [turns, rows]."""
        if self.told[0]:
            self.sums[0][part] += magnitudes.sum(0)
            self.counts[0][part] += len(magnitudes)
        if self.told[1]:
            np.add.at(self.sums[1], column.reshape(-1), magnitudes.reshape(-1))
            self.counts[1] += np.bincount(column.reshape(-1), minlength=self.counts[1].size)
        self._learn_all(tap, magnitudes)

    def learn_some(self, row: Ints, column: Ints, tap: int, magnitudes: Ints) -> None:
        """Learns single symbols."""
        for group, told, sums, counts in zip((row, column), self.told, self.sums, self.counts, strict=False):
            if told:
                np.add.at(sums, group, magnitudes)
                np.add.at(counts, group, 1)
        self._learn_all(tap, magnitudes)

    def _learn_all(self, tap: int, magnitudes: Ints) -> None:
        total = int(magnitudes.sum())
        self.sum += total
        self.count += magnitudes.size
        if self.told[2]:
            self.sums[2][tap] += total
            self.counts[2][tap] += magnitudes.size


class _Tensor:
    """One tensor on its way through a coder: its symbols, flat, and what is known of them."""

    def __init__(self, flat: NDArray[Any], low: int, shape: Sequence[int], histograms: Histograms, exchange: Exchange):
        self.rows, self.columns, self.kernel = places.grid(shape)
        self.taps = math.prod(self.kernel)
        self.flat, self.low, self.histograms, self.exchange = flat, low, histograms, exchange
        self.known = _Known(self.rows, self.columns, self.taps, histograms.mean)
        self.others = _Known(self.rows, self.columns, self.taps, histograms.nonzero or 1.0)  # of symbols that are not zero

    def transfer(self, encode: bool) -> None:
        """Encodes the symbols, or fills them in."""
        histograms, levels = self.histograms, np.arange(self.low, self.low + self.histograms.magnitudes.size).astype(self.flat.dtype)
        for index, (tap, near) in enumerate(places.order(self.kernel)):
            around, weight = self._around(near), sum(weight for _, weight in near)
            for part, column in places.blocks(self.rows, self.columns, index * self.rows * self.columns):
                place = (np.arange(part.start, part.stop) * self.columns + column).reshape(-1)
                at = place * self.taps + tap if self.taps > 1 else place
                given = self.flat[at].astype(np.int64) - self.low if encode else None
                expected = self.known.expect(part, column, tap).reshape(-1)
                here = around[:, place] if near else None
                lean = None
                if here is not None:
                    expected = (here[0] + _TRUST_NEAR * expected) / (weight + _TRUST_NEAR)
                    lean = here[1] / weight
                if histograms.flags is None:
                    found = histograms.table.transfer(self.exchange, expected, lean, given)
                else:
                    found = self._split(part, column, tap, expected, lean, here, given)
                if not encode:
                    self.flat[at] = levels[found]
                self.known.learn(part, column, tap, histograms.magnitudes[found].reshape(column.shape))
        histograms.close(self.known.sum / self.known.count, self.others.sum / self.others.count)

    def _split(self, part: slice, column: Ints, tap: int, expected: Floats, lean: Floats | None, here: Any, given: Ints | None) -> Ints:
        """Moves a block as two decisions for each symbol."""
        histograms, zero = self.histograms, self.histograms.zero
        assert histograms.flags is not None
        flags = None if given is None else (given != zero).astype(np.int64)
        flags = histograms.flags.transfer(self.exchange, expected * ZERO, None if lean is None else np.abs(lean) * ZERO, flags)
        chosen = np.flatnonzero(flags)
        found = np.full(column.size, zero)
        if chosen.size:
            other = self.others.expect(part, column, tap).reshape(-1)[chosen]
            if here is not None and lean is not None:
                other = (here[0, chosen] + _TRUST_NEAR * other) / (here[2, chosen] + _TRUST_NEAR)
                lean = lean[chosen] * other / expected[chosen]
            if given is not None:
                given = given[chosen] - (given[chosen] > zero)
            values = histograms.table.transfer(self.exchange, other, lean, given)
            values += values >= zero
            found[chosen] = values
            row = part.start + chosen % column.shape[1]
            self.others.learn_some(row, column.reshape(-1)[chosen], tap, histograms.magnitudes[values])
        return found

    def _around(self, near: list[tuple[int, float]]) -> NDArray[np.float32]:
        """Weighted sums over neighbours in the kernel [2 or 3, kernels]: of magnitudes, of symbols, and of how many are not zero."""
        split = self.histograms.flags is not None
        around = np.zeros((2 + split, self.rows * self.columns if near else 0), np.float32)
        cube = self.flat.reshape(-1, self.taps)
        values = self.histograms.values.astype(np.float32)
        for start in range(0, around.shape[1], places.BATCH):
            part = around[:, start : start + places.BATCH]
            for other, weight in near:
                value = values[cube[start : start + places.BATCH, other].astype(np.int64) - self.low]
                part[0] += np.float32(weight) * np.abs(value)
                part[1] += np.float32(weight) * value
                if split:
                    part[2] += np.float32(weight) * (value != 0)
        return around


class Encoder:
    """Collects the symbols of tensors in one stream."""

    def __init__(self) -> None:
        self._coder = constriction.stream.queue.RangeEncoder()

    def add(self, symbols: NDArray[Any], low: int, shape: Sequence[int], histograms: Histograms) -> None:
        """Adds a tensor, given flat; ``low`` is subtracted to make symbols."""

        def encode(symbols: NDArray[np.int32] | None, count: int, model: Any) -> NDArray[np.int32]:
            assert symbols is not None
            self._coder.encode(symbols, model)
            return symbols

        if symbols.size and histograms.bulk:
            bulk.transfer(symbols, low, shape, histograms, encode, True)
        elif symbols.size:
            _Tensor(symbols, low, shape, histograms, encode).transfer(True)

    def add_bits(self, values: NDArray[Any], bits: int) -> None:
        """Adds unsigned values of up to 16 bits as they are."""
        if values.size:
            self._coder.encode(values.astype(np.int32), constriction.stream.model.Uniform(1 << bits))

    def data(self) -> bytes:
        # The decoder reads zeros behind the end.
        return bytes(self._coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0"))


class Decoder:
    """Gives back what an ``Encoder`` collected, asked in the same order."""

    def __init__(self, data: bytes | memoryview):
        words = bytes(data) + bytes(-len(data) % 4)
        self._coder = constriction.stream.queue.RangeDecoder(np.frombuffer(words, "<u4").astype(np.uint32))

    def take(self, into: NDArray[Any], low: int, shape: Sequence[int], histograms: Histograms) -> None:
        """Decodes a tensor into a flat array; ``low`` is added to the symbols."""

        def decode(symbols: NDArray[np.int32] | None, count: int, model: Any) -> NDArray[np.int32]:
            found: NDArray[np.int32] = self._coder.decode(model, count)
            return found

        if into.size and histograms.bulk:
            bulk.transfer(into, low, shape, histograms, decode, False)
        elif into.size:
            _Tensor(into, low, shape, histograms, decode).transfer(False)

    def take_bits(self, count: int, bits: int) -> NDArray[np.int32]:
        if not count:
            return np.empty(0, np.int32)
        found: NDArray[np.int32] = self._coder.decode(constriction.stream.model.Uniform(1 << bits), count)
        return found
