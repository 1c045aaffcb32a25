"""Lossless coding of arrays: several codings, of which the smallest wins.

A coded stream is a byte that names the coding, and what that coding made of one array, or of many small ones of one dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from ..errors import FileError
from . import floats, integers
from .bulk import large
from .histograms import Histograms
from .numbers import pack_numbers, unpack_numbers
from .symbols import Decoder, Encoder

Array = NDArray[Any]
Ints = NDArray[np.int64]
Parts = list[bytes]
DTYPES = ("float32", "float16", "uint16", "int8", "uint8", "int16", "int32", "int64", "bool", "float64", "uint32", "uint64")
RAW, PLANES, INTEGERS, FLOATS, PALETTE, CONSTANT = range(6)
_CHUNK = 1 << 16
_COLORS = 1024  # values in a palette
_PROBE = 1 << 16  # bytes, three times, on which large arrays are tried
_LARGE = 1 << 22
WORDS = 1  # the dictionary that is written with
_FORMAT = zstandard.FORMAT_ZSTD1_MAGICLESS


def encode(array: Array) -> bytes:
    """The coded bytes of an array of a dtype in ``DTYPES``. Raises ``FileError`` for another dtype."""
    return b"".join(encode_all([array]))


def decode(data: bytes | memoryview, dtype: str, shape: Sequence[int]) -> Array:
    """The array that was coded. Raises ``FileError`` when ``data`` cannot be one of this dtype and shape."""
    return decode_all(data, dtype, [shape])[0]


def encode_all(arrays: Sequence[Array]) -> Parts:
    """The coded bytes, in parts, of arrays of one dtype; together they take less than one by one."""
    kind = arrays[0].dtype
    if kind.name not in DTYPES:
        raise FileError(f"An array of dtype {kind.name}.", ", ".join(DTYPES), "cast it first.")
    # asarray and not ascontiguousarray: the latter turns a scalar into a vector.
    arrays = [np.asarray(a, kind.newbyteorder("="), order="C") for a in arrays]
    best: Parts | None = None
    for found in _candidates(arrays) if any(a.size for a in arrays) else ():
        if best is None or _size(found) < _size(best):
            best = found
    if best is None or _size(best) > sum(a.nbytes for a in arrays):
        best = [bytes([RAW]), *(a.astype(kind.newbyteorder("<"), copy=False).tobytes() for a in arrays)]
    return best


def _size(parts: Parts) -> int:
    return sum(map(len, parts))


def constant(array: Array) -> bool:
    """Whether all elements are the same, bit by bit."""
    words = array.reshape(-1).view(f"u{array.itemsize}")
    return bool(words.size > 1 and words[0] == words[-1] and (words == words[0]).all())


def _candidates(arrays: Sequence[Array]) -> Iterator[Parts]:
    if all(constant(a) for a in arrays):
        yield [bytes([CONSTANT]), *encode_all([np.array([a.reshape(-1)[0] for a in arrays])])]
        return
    name, small = arrays[0].dtype.name, sum(a.nbytes for a in arrays) < _LARGE
    if arrays[0].dtype.kind != "f" and (found := integers.encode(arrays)):
        yield [bytes([INTEGERS]), *found]
    if name in floats.MANTISSA:
        yield [bytes([FLOATS]), *floats.encode(arrays)]
    if not (arrays[0].dtype.kind in "iub" and integers.direct(arrays)) and (colors := _colors(arrays)) is not None:
        yield [bytes([PALETTE]), *_encode_palette(arrays, colors)]
    if small or _repeats(arrays[0]):
        yield [bytes([PLANES]), compress(b"".join(_planes(a) for a in arrays), 9)]


def decode_all(data: bytes | memoryview, dtype: str, shapes: Sequence[Sequence[int]]) -> list[Array]:
    """The arrays that were coded together. Raises ``FileError`` when ``data`` cannot be arrays of this dtype and these shapes."""
    try:
        return _decode(memoryview(data), dtype, shapes)
    except (ValueError, IndexError, OverflowError, AssertionError, TypeError, KeyError) as error:
        raise FileError(f"Coded tensors that cannot be {dtype} {[list(s) for s in shapes][:3]}: {error}.", "what multum wrote") from error


def _decode(data: memoryview, dtype: str, shapes: Sequence[Sequence[int]]) -> list[Array]:
    if dtype not in DTYPES or len(data) == 0:
        raise ValueError("no known dtype or no data")
    kind, coding, body = np.dtype(dtype), data[0], data[1:]
    if coding == INTEGERS and kind.kind != "f":
        return integers.decode(body, kind, shapes)
    if coding == FLOATS:
        return floats.decode(body, kind, shapes)
    if coding == PALETTE:
        return _decode_palette(body, kind, shapes)
    # The values of several arrays may be the same in turn, but not that one value again.
    if coding == CONSTANT and body and (body[0] != CONSTANT or len(shapes) > 1):
        return [np.full(shape, value) for value, shape in zip(decode(body, dtype, (len(shapes),)), shapes, strict=True)]
    if coding not in (RAW, PLANES):
        raise ValueError(f"unknown coding {coding}")
    sizes = [math.prod(shape) for shape in shapes]
    if coding == RAW:
        flat = np.frombuffer(body, kind.newbyteorder("<"))
        if flat.size != sum(sizes):
            raise ValueError(f"{flat.size} values for {sum(sizes)}")
        flats = np.split(flat, np.cumsum(sizes)[:-1])
    else:
        plain, ends = decompress(body, sum(sizes) * kind.itemsize), np.cumsum([0, *sizes]) * kind.itemsize
        planes = (np.frombuffer(plain, np.uint8, size * kind.itemsize, start) for size, start in zip(sizes, ends[:-1], strict=True))
        flats = [np.ascontiguousarray(p.reshape(kind.itemsize, -1).T).reshape(-1).view(kind.newbyteorder("<")) for p in planes]
    return [flat.astype(kind).reshape(shape) for flat, shape in zip(flats, shapes, strict=True)]


def _planes(array: Array) -> bytes:
    """The bytes of an array, all first bytes first."""
    little = array.reshape(-1).astype(array.dtype.newbyteorder("<"), copy=False)
    return little.view(np.uint8).reshape(-1, array.itemsize).T.tobytes()


def _repeats(array: Array) -> bool:
    """Whether samples of a large array say that matching repeated bytes is worth a try."""
    flat = array.reshape(-1)
    step = _PROBE // array.itemsize
    samples = [_planes(flat[start : start + step]) for start in (0, flat.size // 2, max(0, flat.size - step))]
    return 3 * len(compress(b"".join(samples), 3)) < sum(map(len, samples))


def _ordered(words: Array) -> Ints:
    """The bits of floats as integers in the order of the floats; integers as they are."""
    if words.dtype.kind != "f":
        return words.astype(np.int64)
    bits = words.view(f"i{words.itemsize}").astype(np.int64)
    return np.where(bits < 0, -1 - (bits & (1 << (8 * words.itemsize - 1)) - 1), bits)


def _disordered(keys: Ints, kind: np.dtype[Any]) -> Array:
    if kind.kind != "f":
        return keys.astype(kind)
    sign = -1 << (8 * kind.itemsize - 1)
    return np.where(keys < 0, (-1 - keys) | sign, keys).astype(f"i{kind.itemsize}").view(kind)


def _parts(flat: Array) -> Iterator[Array]:
    return (flat[i : i + _CHUNK] for i in range(0, flat.size, _CHUNK))


def _colors(arrays: Sequence[Array]) -> Ints | None:
    """The distinct values in ascending order, as ``_ordered`` gives them; ``None`` when they are too many to be worth a palette."""
    found = np.empty(0, np.int64)
    for array in arrays:
        flat = array.reshape(-1)
        for part in (flat[:: max(1, flat.size // 2048)], *_parts(flat)):
            found = np.union1d(found, _ordered(part))
            if found.size > _COLORS:
                return None
    return found if found.size <= sum(a.size for a in arrays) // 4 else None


def _palette(near: int, count: int, sizes: Sequence[int]) -> Histograms:
    return Histograms(np.arange(count) - near, max(1.0, count / 8), sum(sizes), bulk=large(sizes))


def _encode_palette(arrays: Sequence[Array], colors: Ints) -> Parts:
    coded = encode(_disordered(colors, arrays[0].dtype))
    near = int(np.abs(colors).argmin())
    stream, histograms = Encoder(), _palette(near, colors.size, [a.size for a in arrays])
    for array in arrays:
        index = np.empty(array.size, np.uint16)
        for here, part in zip(_parts(index), _parts(array.reshape(-1)), strict=True):
            here[:] = np.searchsorted(colors, _ordered(part))
        stream.add(index, 0, array.shape, histograms)
    # The head: colors, the index of the one nearest to zero, bytes of the coded colors.
    return [pack_numbers(colors.size, near, len(coded)), coded, stream.data()]


def _decode_palette(data: memoryview, kind: np.dtype[Any], shapes: Sequence[Sequence[int]]) -> list[Array]:
    (count, near, length), data = unpack_numbers(data, 3)
    if not (0 <= near < count <= _COLORS and 0 <= length <= len(data)) or data[0] == PALETTE:
        raise ValueError("impossible palette")
    colors = decode(data[:length], kind.name, (count,))
    sizes = [math.prod(shape) for shape in shapes]
    stream, histograms, found = Decoder(data[length:]), _palette(near, count, sizes), []
    for size, shape in zip(sizes, shapes, strict=True):
        index = np.empty(size, np.uint16)
        stream.take(index, 0, shape, histograms)
        found.append(colors[index].reshape(shape))
    return found


def compress(plain: bytes, level: int = 19, *, words: bool = False) -> bytes:
    """A frame that does not state its size. With ``words`` it may refer to the dictionary of descriptions."""
    parameters = zstandard.ZstdCompressionParameters.from_level(level, format=_FORMAT, write_content_size=False, write_dict_id=True)
    return zstandard.ZstdCompressor(compression_params=parameters, dict_data=_words(WORDS) if words and WORDS else None).compress(plain)


def decompress(data: bytes | memoryview, size: int, *, words: bool = False) -> bytes:
    """The ``size`` bytes that were compressed. Raises ``ValueError`` when they are more or fewer, or damaged."""
    try:
        # A frame that states its size would be believed beyond max_output_size: here none does.
        parameters = zstandard.get_frame_parameters(data, format=_FORMAT)
        if parameters.content_size not in (zstandard.CONTENTSIZE_UNKNOWN, size):
            raise ValueError("a frame of another size")
        known = _words(parameters.dict_id) if words and parameters.dict_id else None
        decompressor = zstandard.ZstdDecompressor(known, format=_FORMAT)
        plain = decompressor.decompress(data, max_output_size=max(size, 1), allow_extra_data=False)  # 0 would mean: any size
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    if len(plain) != size:
        raise ValueError(f"{len(plain)} bytes for {size}")
    return bytes(plain)


@lru_cache(maxsize=4)
def _words(number: int) -> zstandard.ZstdCompressionDict:
    """A dictionary of what descriptions of graphs say; files name the one that they were written with. `bench/words.py` makes them."""
    try:
        return zstandard.ZstdCompressionDict((Path(__file__).parent / f"words{number}.zdict").read_bytes())
    except OSError:
        raise ValueError(f"it needs the dictionary {number}, which only a newer version has") from None
