"""Context-modelled entropy coding of symbols: what the coder learns from a tensor, encoder and decoder learn alike.

The symbols of a tensor are visited in an order that spreads over all of it, in growing batches. Before each batch the magnitude of
every symbol in it is predicted from what is known so far of its output channel, input channel, kernel position and kernel; the
prediction, and the sign towards which the kernel leans, select one of some hundred adaptive histograms, and a range coder does the rest.
No table is stored. Predictions are sums of integers joined by IEEE additions, products and quotients, which every machine rounds alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
# Codes the symbols at these positions of a tensor with a model, and returns them.
Exchange = Callable[[Ints, Any], NDArray[np.int32]]

_BATCH = 1 << 16  # symbols; bounds the memory
_FIRST, _GROWTH = 16, 6  # a batch is at least the first, and a _GROWTH-th of what is known
_LOWEST = 6  # octaves below 1 that are told apart
_LEANS = (0.5, 2.0)  # times the predicted magnitude
_UNIT, _FINE = 64, 1024  # weight of one seen symbol, and fractions of one in a prior
_MANY = 1 << 19  # symbols in a stream that can fill finer classes of magnitude
_TRUST = (16, 4)  # symbols that a prediction outweighs: of a channel, of a kernel
_PRIOR, _SHAPE, _OTHERS = 60, 20, 4  # symbols that a prior is worth; of them, and of a neighbour's symbols, in the prior itself
_BELL = 2.0  # width of the bell curve, times the predicted magnitude


def pack_numbers(*numbers: int) -> bytes:
    """Integers, small ones in a byte: seven bits at a time, the lowest first, the sign in front of them."""
    packed = bytearray()
    for number in numbers:
        rest = 2 * number if number >= 0 else -2 * number - 1
        while rest > 127:
            packed.append(rest & 127 | 128)
            rest >>= 7
        packed.append(rest)
    return bytes(packed)


def unpack_numbers(data: memoryview, count: int) -> tuple[list[int], memoryview]:
    """``count`` integers, and the data behind them. Raises ``ValueError`` when one is longer than 63 bits."""
    numbers, place = [], 0
    for _ in range(count):
        number = shift = 0
        while (byte := data[place]) > 127 and shift < 56:
            number, shift, place = number | (byte & 127) << shift, shift + 7, place + 1
        if byte > 127:
            raise ValueError("a number is too long")
        number, place = number | byte << shift, place + 1
        numbers.append(-(number >> 1) - 1 if number & 1 else number >> 1)
    return numbers, data[place:]


def mean_code(mean: float) -> int:
    """A magnitude in one byte, in quarter octaves from 1/64 up."""
    return int(np.clip((np.float64(max(mean, 2.0**-6)).view(np.int64) >> 50) - (1017 << 2), 0, 255))


def mean_of(code: int) -> float:
    return math.ldexp(1 + code % 4 / 4, code // 4 - 6)


class Histograms:
    """Counts of symbols by context [contexts, K], shared by the tensors of a stream.

    ``values`` [K] are what the symbols stand for, ``mean`` is their mean magnitude, ``size`` is the number of symbols to come.
    """

    def __init__(self, values: Ints, mean: float, size: int):
        # A model of a single symbol does not exist: a second one is never used.
        self.values, self.mean = np.append(values, values + 1) if values.size == 1 else values, mean
        values = self.values
        self.steps = 2 if size >= _MANY else 1
        self.leans = 2 * len(_LEANS) + 1 if values.min() < 0 < values.max() else 1
        self.classes = (_LOWEST + int(np.abs(values).max()).bit_length() + 1) << self.steps
        # A class more at either end, so that each has neighbours.
        self.counts = np.zeros(((self.classes + 2) * self.leans, values.size), np.int64)
        part = 1 << self.steps
        widths = np.array([math.ldexp(1 + i % part / part, i // part - _LOWEST) for i in range(-1, self.classes + 1)])
        ratio = values / (_BELL * widths[:, None])
        bell = 1 / ((1 + ratio * ratio) * (1 + ratio * ratio))
        self._bell = np.floor(bell * (_SHAPE * _FINE / np.cumsum(bell, 1)[:, -1:])).astype(np.int64)

    def classify(self, expected: Floats, lean: Ints | None) -> Ints:
        """The context of each symbol, from its predicted magnitude and the sum of the known symbols of its kernel."""
        # The bits of a positive double, read as an integer, are a piecewise linear logarithm.
        step = (expected.view(np.int64) >> (52 - self.steps)) - ((1023 - _LOWEST) << self.steps)
        context: Ints = (np.clip(step, 0, self.classes - 1) + 1) * self.leans
        if lean is None or self.leans == 1:
            return context
        context += len(_LEANS)
        for limit in _LEANS:
            context += (lean > limit * expected).astype(np.int64) - (lean < -limit * expected)
        return context

    def weights(self, contexts: Ints, own: Ints) -> Floats:
        """Weights [contexts, K] of the symbols: seen in this tensor, and a prior from neighbours, other tensors and a bell curve."""
        near = _OTHERS * self.counts[contexts]
        for other in (contexts - self.leans, contexts + self.leans):
            near += own[other] + self.counts[other]
        base = near * _FINE + self._bell[contexts // self.leans]
        prior = np.floor(base * (_PRIOR * _UNIT / base.sum(1, keepdims=True)))
        return np.asarray(own[contexts] * _UNIT + prior + 1, np.float64)


class _Groups:
    """What is known of one tensor: sums of magnitudes and counts, by output channel, input channel, position and kernel."""

    def __init__(self, shape: Sequence[int], mean: float):
        size, rows = math.prod(shape), shape[0] if len(shape) > 1 else 1
        taps = math.prod(shape[2:])
        inputs = size // (rows * taps)
        # A group is (position // divisor) % count.
        channels = [(inputs * taps, rows), (taps, inputs), (1, taps)]
        self.channels = [(d, n, np.zeros(n, np.int64), np.zeros(n, np.int64)) for d, n in channels if 1 < n < size]
        self.taps = taps
        if taps > 1:
            self.kernels = np.zeros((3, size // taps), np.int32)
        self.sum, self.count = 4 * mean, 4

    def predict(self, at: Ints) -> tuple[Floats, Ints | None]:
        """The expected magnitude at each position, and the sum of the known symbols of its kernel."""
        overall = self.sum / self.count
        trust = _TRUST[0]
        expected = np.full(at.size, overall)
        for divisor, number, sums, counts in self.channels:
            ratio = (sums + trust * overall) / ((counts + trust) * overall)
            expected *= ratio[at // divisor % number]
        if self.taps == 1:
            return expected, None
        total, count, lean = self.kernels[:, at // self.taps]
        return (total + _TRUST[1] * expected) / (count + _TRUST[1]), lean.astype(np.int64)

    def learn(self, at: Ints, values: Ints) -> None:
        magnitude = np.abs(values)
        self.sum += int(magnitude.sum())
        self.count += at.size
        for divisor, number, sums, counts in self.channels:
            group = at // divisor % number
            np.add.at(sums, group, magnitude)
            np.add.at(counts, group, 1)
        if self.taps > 1:
            kernel = at // self.taps
            for row, what in zip(self.kernels, (magnitude, np.ones_like(values), values), strict=True):
                np.add.at(row, kernel, what.astype(np.int32))


def _batches(count: int) -> Iterator[Ints]:
    """All positions below ``count`` once, each batch spread over all of them."""
    stride = max(1, int(count * 0.6180339887))
    while math.gcd(stride, count) != 1:
        stride -= 1
    start = 0
    while start < count:
        end = min(count, start + min(_BATCH, max(_FIRST, start // _GROWTH)))
        yield np.arange(start, end, dtype=np.int64) * stride % count
        start = end


def _transfer(shape: Sequence[int], histograms: Histograms, exchange: Exchange) -> None:
    """Moves the symbols of one tensor through ``exchange``, which encodes or decodes them; the models come out the same."""
    if math.prod(shape) == 0:
        return
    known, own, values = _Groups(shape, histograms.mean), np.zeros_like(histograms.counts), histograms.values
    for positions in _batches(math.prod(shape)):
        contexts = histograms.classify(*known.predict(positions))
        order = np.argsort(contexts.astype(np.uint16), kind="stable")
        positions, contexts = positions[order], contexts[order]
        starts = np.flatnonzero(np.diff(contexts, prepend=-1))
        symbols = np.empty(positions.size, np.int32)
        weights = histograms.weights(contexts[starts], own)
        for start, end, row in zip(starts, [*starts[1:], positions.size], weights, strict=True):
            model = constriction.stream.model.Categorical(row, perfect=False)
            symbols[start:end] = exchange(positions[start:end], model)
        np.add.at(own, (contexts, symbols), 1)
        known.learn(positions, values[symbols])
    histograms.counts += own
    histograms.mean = max(known.sum / known.count, 2.0**-_LOWEST)


class Encoder:
    """Collects the symbols of tensors in one stream."""

    def __init__(self) -> None:
        self._coder = constriction.stream.queue.RangeEncoder()

    def add(self, symbols: NDArray[Any], low: int, shape: Sequence[int], histograms: Histograms) -> None:
        """Adds a tensor, given flat; ``low`` is subtracted to make symbols."""

        def exchange(at: Ints, model: Any) -> NDArray[np.int32]:
            found = (symbols[at].astype(np.int64) - low).astype(np.int32)
            self._coder.encode(found, model)
            return found

        _transfer(shape, histograms, exchange)

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

        def exchange(at: Ints, model: Any) -> NDArray[np.int32]:
            found: NDArray[np.int32] = self._coder.decode(model, at.size)
            into[at] = found.astype(np.int64) + low
            return found

        _transfer(shape, histograms, exchange)

    def take_bits(self, count: int, bits: int) -> NDArray[np.int32]:
        if not count:
            return np.empty(0, np.int32)
        found: NDArray[np.int32] = self._coder.decode(constriction.stream.model.Uniform(1 << bits), count)
        return found
