"""Coding of floats, exact to the bit: octave and leading bits as a context-modelled symbol, the other bits as they are.

The two zeros are symbols of their own (a mask leaves many of both). Trailing bits that are zero
throughout a tensor, and the sign of a tensor without negative numbers, cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bulk import large
from .histograms import Histograms
from .numbers import mean_code, mean_of, pack_bits, pack_numbers, unpack_bits, unpack_numbers
from .symbols import Decoder, Encoder

Array = NDArray[Any]
Ints = NDArray[np.int64]
_CHUNK = 1 << 16
_SEVERAL = 1 << 18  # values; fewer are tried with and without leading bits
_OCTAVES = 12  # below the largest value that contexts tell apart
_LEADING = 2  # most bits of the mantissa in a symbol
_MOST = 1 << 12  # symbols
MANTISSA = {"float32": 23, "float16": 10, "uint16": 7}  # uint16 holds bfloat16


def encode(arrays: Sequence[Array]) -> list[bytes]:
    """The arrays, of one dtype in ``MANTISSA``, as parts of one stream."""
    # Magnitude predicts well inside a large weight, and badly across a crowd of small vectors.
    leading = range(_LEADING + 1) if sum(a.size for a in arrays) < _SEVERAL else (1,)
    return min((_encode(arrays, n) for n in leading), key=lambda parts: sum(map(len, parts)))


def _encode(arrays: Sequence[Array], leading: int) -> list[bytes]:
    mantissa = MANTISSA[arrays[0].dtype.name]
    words = [a.reshape(-1).view(f"u{a.itemsize}") for a in arrays]
    symbols = [_symbols(w, mantissa - leading) for w in words]
    low = min((int(s.min(initial=_MOST, where=s > 1)) for s in symbols), default=_MOST)
    span = max(*(int(s.max(initial=low)) for s in symbols), low) - low
    for each in symbols:
        np.subtract(each, low - 2, out=each, where=each > 1)
    values, size = _values(low, span, leading), sum(w.size for w in words)
    mean = mean_code(sum(int(values[part].sum()) for s in symbols for part in _parts(s)) / max(size, 1))
    stream, histograms = Encoder(), Histograms(values, mean_of(mean), size, bulk=large([w.size for w in words]))
    forms = np.array([_form(w, mantissa - leading) for w in words])
    stream.add(forms, 0, forms.shape, _forms())
    for array, each in zip(arrays, symbols, strict=True):
        stream.add(each, 0, array.shape, histograms)
    rest = [_rest(part, int(form), mantissa - leading) for w, form in zip(words, forms, strict=True) for part in _parts(w)]
    data = stream.data()
    # The head: leading bits, mean magnitude, the smallest symbol but those of zeros, how many more, bytes of the range coder.
    return [pack_numbers(leading, mean, low, span, len(data)), data, *rest]


def decode(data: memoryview, dtype: np.dtype[Any], shapes: Sequence[Sequence[int]]) -> list[Array]:
    (leading, mean, low, span, length), data = unpack_numbers(data, 5)
    mantissa = MANTISSA[dtype.name]
    if not (0 <= leading <= _LEADING and 0 <= mean < 256 and 0 <= low <= _MOST and 0 <= span < _MOST and 0 <= length <= len(data)):
        raise ValueError("impossible parameters of floats")
    sizes = [math.prod(shape) for shape in shapes]
    stream, histograms = Decoder(data[:length]), Histograms(_values(low, span, leading), mean_of(mean), sum(sizes), bulk=large(sizes))
    forms = np.empty(len(shapes), np.int64)
    stream.take(forms, 0, forms.shape, _forms())
    symbols = [np.empty(size, np.uint16) for size in sizes]
    for each, shape in zip(symbols, shapes, strict=True):
        stream.take(each, 0, shape, histograms)
    found, rest = [], data[length:]
    for each, form, shape in zip(symbols, forms, shapes, strict=True):
        words = np.empty(each.size, f"u{dtype.itemsize}")
        for here, part in zip(_parts(words), _parts(each), strict=True):
            rest = _join(here, part, low, rest, int(form), mantissa - leading)
        found.append(words.view(dtype).reshape(shape))
    return found


def _parts(flat: Array) -> Iterator[Array]:
    return (flat[i : i + _CHUNK] for i in range(0, flat.size, _CHUNK))


def _symbols(words: Array, open_bits: int) -> NDArray[np.uint16]:
    """Octave and leading bits, plus two; 0 and 1 for the zeros."""
    result = np.empty(words.size, np.uint16)
    sign = words.dtype.type(1 << (8 * words.itemsize - 1))
    for here, part in zip(_parts(result), _parts(words), strict=True):
        magnitude = part & ~sign
        here[:] = np.where(magnitude, (magnitude >> open_bits) + 2, part >> (8 * words.itemsize - 1))
    return result


def _values(low: int, span: int, leading: int) -> Ints:
    """What the symbols stand for in contexts: 0, and the magnitude in steps of 2**-_OCTAVES of the largest; 1 without leading bits."""
    bits = np.arange(low - 2, low + span - 1, dtype=np.int64)
    if leading == 0:
        return np.concatenate([[0, 0], np.ones_like(bits)])
    shift = (bits >> leading) - (int(bits[-1]) >> leading) + _OCTAVES - leading
    significand = (bits & (1 << leading) - 1) + (1 << leading)
    magnitude = np.where(shift >= 0, significand << np.maximum(shift, 0), significand >> np.clip(-shift, 0, 63))
    return np.concatenate([[0, 0], np.maximum(magnitude, 1)])


def _forms() -> Histograms:
    return Histograms(np.arange(64), 16.0, 0)


def _form(words: Array, open_bits: int) -> int:
    """Which of the open bits of a tensor have to be kept: twice the number of trailing bits to drop, and one if there are signs."""
    sign = words.dtype.type(1 << (8 * words.itemsize - 1))
    every = 0
    for part in _parts(words):
        every |= int(np.bitwise_or.reduce(part[part & ~sign != 0], initial=0))
    low = every & (1 << open_bits) - 1
    return 2 * ((low & -low).bit_length() - 1 if low else open_bits) + (every >> (8 * words.itemsize - 1))


def _rest(words: Array, form: int, open_bits: int) -> bytes:
    """The kept bits of the words but zeros."""
    bits = words.astype(np.uint64)
    bits = bits[bits & np.uint64((1 << 8 * words.itemsize - 1) - 1) != 0]
    drop, signed = divmod(form, 2)
    signs = bits >> np.uint64(8 * words.itemsize - 1) << np.uint64(open_bits - drop)
    return pack_bits((bits & np.uint64((1 << open_bits) - 1)) >> np.uint64(drop) | signs, open_bits - drop + signed)


def _join(into: Array, symbols: NDArray[np.uint16], low: int, rest: memoryview, form: int, open_bits: int) -> memoryview:
    """Puts words together from symbols and kept bits; gives what is left of the latter."""
    drop, signed = divmod(form, 2)
    if drop > open_bits:
        raise ValueError("more bits dropped than there are")
    sign = 8 * into.itemsize - 1
    zeros = symbols < 2
    some = bool(zeros.any())
    filled = symbols[~zeros] if some else symbols
    kept, rest = unpack_bits(rest, filled.size, open_bits - drop + signed)
    words = filled.astype(np.int64) + (low - 4) << open_bits
    words |= (kept & np.uint64((1 << open_bits - drop) - 1)).view(np.int64) << drop
    words |= (kept >> np.uint64(open_bits - drop)).view(np.int64) << sign
    if some:
        into[:] = np.where(symbols == 1, 1 << sign, 0)
        into[~zeros] = words
    else:
        into[:] = words
    return rest
