"""Coding of integers: few levels as symbols; a wide range as a symbol for sign, octave and leading bits, and the rest as bits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bulk import kernel, large
from .histograms import Histograms
from .numbers import mean_code, mean_of, pack_numbers, unpack_numbers
from .symbols import Decoder, Encoder

Array = NDArray[Any]
Ints = NDArray[np.int64]
_DIRECT, _MOST = 64, 256  # levels that are symbols themselves; and where there are many symbols to learn from
_SUB = 3  # leading bits of a bucket behind the first one
_CHUNK = 1 << 16
_SEVERAL, _SPARSE = 1 << 19, 0.6  # symbols, fewer are tried with and without decisions for zero; share of zeros that makes them worth it
_BULK, _LOSS = 2, 1.005  # added to the number of means; so much larger may be what is faster
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
    return high - low < (_MOST if large([a.size for a in arrays]) else _DIRECT)


def _range(arrays: Sequence[Array]) -> tuple[int, int]:
    filled = [a for a in arrays if a.size]
    return min(int(a.min()) for a in filled), max(int(a.max()) for a in filled)


def encode(arrays: Sequence[Array]) -> list[bytes] | None:
    """The arrays, of one integer dtype, in one stream; ``None`` when a value is too large."""
    low, high = _range(arrays)
    if low <= -_LIMIT or high >= _LIMIT:
        return None
    size, zeros, total = sum(a.size for a in arrays), 0, 0.0
    for part in (part for a in arrays for part in _parts(a.reshape(-1))):
        total += float(np.abs(part.astype(np.int64)).sum())
        zeros += part.size - int(np.count_nonzero(part))
    # Magnitudes as symbols.py sees them.
    means = mean_code(total / size), mean_code(total / max(size - zeros, 1))
    sparse = zeros > _SPARSE * size and low <= 0 <= high and high - low > 1
    split = [False] if not low <= 0 <= high or high - low < 2 else [False, True] if size < _SEVERAL else [sparse]
    fast = _encode(arrays, means[: 1 + sparse], True) if large([a.size for a in arrays]) else None
    if fast and size >= _SEVERAL and not kernel(arrays[0].shape):
        return fast
    best = min((_encode(arrays, means if s else means[:1], False) for s in split), key=_size)
    return fast if fast and _size(fast) < _LOSS * _size(best) else best


def _size(parts: list[bytes]) -> int:
    return sum(map(len, parts))


def _encode(arrays: Sequence[Array], means: Sequence[int], fast: bool) -> list[bytes]:
    low, high = _range(arrays)
    few = high - low < (_MOST if fast else _DIRECT)
    if not few:
        low, high = (int(buckets(np.array([v]))[0][0]) for v in (low, high))
    stream, histograms = Encoder(), _histograms(low, high, few, means, sum(a.size for a in arrays), fast)
    for array in arrays:
        flat = array.reshape(-1)
        stream.add(flat if few else _bucketed(flat), low, array.shape, histograms)
    if not few:
        for array in arrays:
            for part in _parts(array.reshape(-1)):
                _add_open_bits(stream, part.astype(np.int64))
    # The head: the lowest level or bucket, how many more, what codes them and whether they are levels, the mean magnitudes.
    return [pack_numbers(low, high - low, 2 * (len(means) + _BULK * fast) + few, *means), stream.data()]


def decode(data: memoryview, dtype: np.dtype[Any], shapes: Sequence[Sequence[int]]) -> list[Array]:
    (low, span, kind), data = unpack_numbers(data, 3)
    number, few = divmod(kind, 2)
    fast = number > _BULK
    number -= _BULK * fast
    means, data = unpack_numbers(data, number) if number in (1, 2) else ([-1], data)
    if not (0 <= span < (_MOST if fast else _DIRECT) and abs(low) < _LIMIT if few else -_BUCKETS < low <= low + span < _BUCKETS) or not all(
        0 <= mean < 256 for mean in means
    ):
        raise ValueError("impossible parameters of integers")
    if number == 2 and not (low <= 0 <= low + span and span >= 2):
        raise ValueError("no zero among the integers")
    sizes = [math.prod(shape) for shape in shapes]
    histograms = _histograms(low, low + span, bool(few), means, sum(sizes), fast)
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


def _histograms(low: int, high: int, few: bool, means: Sequence[int], size: int, fast: bool) -> Histograms:
    values = np.arange(low, high + 1, dtype=np.int64)
    mean, nonzero = mean_of(means[0]), mean_of(means[1]) if len(means) > 1 else None
    return Histograms(values if few else _lowest(values)[0], mean, size, nonzero, fast)


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
