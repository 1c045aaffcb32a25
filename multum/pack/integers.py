"""Coding of integers: few levels as symbols; a wide range as a symbol for sign, octave and leading bits, and the rest as bits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .symbols import Decoder, Encoder, Histograms, mean_code, mean_of, pack_numbers, unpack_numbers

Array = NDArray[Any]
Ints = NDArray[np.int64]
_DIRECT = 64  # levels that are symbols themselves
_SUB = 3  # leading bits of a bucket behind the first one
_CHUNK = 1 << 16
_LIMIT = 1 << 31  # magnitudes that can be coded
_BUCKETS = 31 - _SUB + 1 << _SUB  # in which they fall


def buckets(values: Ints) -> tuple[Ints, Ints]:
    """The signed bucket of each value, and the number of its bits that the bucket leaves open."""
    magnitude = np.abs(values)
    shift = np.maximum(np.frexp(magnitude.astype(np.float64))[1].astype(np.int64) - 1 - _SUB, 0)
    return np.sign(values) * ((shift << _SUB) + (magnitude >> shift)), shift


def _lowest(bucket: Ints) -> tuple[Ints, Ints]:
    """The smallest magnitude in each bucket, signed, and its open bits."""
    index = np.abs(bucket)
    shift = np.maximum((index >> _SUB) - 1, 0)
    return np.sign(bucket) * ((index - (shift << _SUB)) << shift), shift


def direct(arrays: Sequence[Array]) -> bool:
    """Whether the arrays have so few levels that each is a symbol."""
    low, high = _range(arrays)
    return high - low < _DIRECT


def _range(arrays: Sequence[Array]) -> tuple[int, int]:
    filled = [a for a in arrays if a.size]
    return min(int(a.min()) for a in filled), max(int(a.max()) for a in filled)


def encode(arrays: Sequence[Array]) -> list[bytes] | None:
    """The arrays, of one integer dtype, in one stream; ``None`` when a value is too large."""
    low, high = _range(arrays)
    if low <= -_LIMIT or high >= _LIMIT:
        return None
    size = sum(a.size for a in arrays)
    # Magnitudes as symbols.py sees them; in parts, to bound the memory.
    mean = mean_code(sum(float(np.abs(part.astype(np.int64)).sum()) for a in arrays for part in _parts(a.reshape(-1))) / size)
    stream, few = Encoder(), high - low < _DIRECT
    if not few:
        low, high = (int(buckets(np.array([v]))[0][0]) for v in (low, high))
    histograms = _histograms(low, high, few, mean, size)
    for array in arrays:
        flat = array.reshape(-1)
        stream.add(flat if few else _bucketed(flat), low, array.shape, histograms)
    if not few:
        for array in arrays:
            for part in _parts(array.reshape(-1)):
                _add_open_bits(stream, part.astype(np.int64))
    # The head: the lowest level or bucket, how many more, whether they are levels, and the mean magnitude.
    return [pack_numbers(low, high - low, few, mean), stream.data()]


def decode(data: memoryview, dtype: np.dtype[Any], shapes: Sequence[Sequence[int]]) -> list[Array]:
    (low, span, few, mean), data = unpack_numbers(data, 4)
    if not (0 <= span < _DIRECT and abs(low) < _LIMIT if few else -_BUCKETS < low <= low + span < _BUCKETS) or not 0 <= mean < 256:
        raise ValueError("impossible parameters of integers")
    sizes = [math.prod(shape) for shape in shapes]
    histograms = _histograms(low, low + span, bool(few), mean, sum(sizes))
    stream, found = Decoder(data), []
    for size, shape in zip(sizes, shapes, strict=True):
        found.append(np.empty(size, dtype if few else np.int16))
        stream.take(found[-1], low, shape, histograms)
    if not few:
        for i, bucket in enumerate(found):
            found[i] = np.empty(bucket.size, dtype)
            for here, part in zip(_parts(found[i]), _parts(bucket), strict=True):
                here[:] = _take_open_bits(stream, part.astype(np.int64))
    return [flat.reshape(shape) for flat, shape in zip(found, shapes, strict=True)]


def _histograms(low: int, high: int, few: bool, mean: int, size: int) -> Histograms:
    values = np.arange(low, high + 1, dtype=np.int64)
    return Histograms(values if few else _lowest(values)[0], mean_of(mean), size)


def _parts(flat: Array) -> Iterator[Array]:
    return (flat[i : i + _CHUNK] for i in range(0, flat.size, _CHUNK))


def _bucketed(flat: Array) -> NDArray[np.int16]:
    result = np.empty(flat.size, np.int16)
    for here, part in zip(_parts(result), _parts(flat), strict=True):
        here[:] = buckets(part.astype(np.int64))[0]
    return result


def _add_open_bits(stream: Encoder, values: Ints) -> None:
    magnitude, shift = np.abs(values), buckets(values)[1]
    for bits in range(1, int(shift.max(initial=0)) + 1):
        rest = magnitude[shift == bits] & ((1 << bits) - 1)
        stream.add_bits(rest & 0xFFFF, min(bits, 16))
        if bits > 16:
            stream.add_bits(rest >> 16, bits - 16)


def _take_open_bits(stream: Decoder, bucket: Ints) -> Ints:
    lowest, shift = _lowest(bucket)
    for bits in range(1, int(shift.max(initial=0)) + 1):
        chosen = np.flatnonzero(shift == bits)
        rest = stream.take_bits(chosen.size, min(bits, 16)).astype(np.int64)
        if bits > 16:
            rest |= stream.take_bits(chosen.size, bits - 16).astype(np.int64) << 16
        lowest[chosen] += np.sign(bucket[chosen]) * rest
    return lowest
