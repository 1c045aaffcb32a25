"""Lossless coding of arrays: several codings, of which the smallest wins."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from multum.errors import FileError
from multum.pack import symbols

DTYPES = ("float32", "float16", "uint16", "int8", "uint8", "int16", "int32", "int64", "bool")
RAW, PLANES, SYMBOLS = range(3)
Array = NDArray[Any]


def encode(array: Array) -> bytes:
    """The coded bytes of one array of a dtype in ``DTYPES``."""
    return encode_all([array])


def decode(data: bytes | memoryview, dtype: str, shape: Sequence[int]) -> Array:
    return decode_all(data, dtype, [shape])[0]


def encode_all(arrays: Sequence[Array]) -> bytes:
    """The coded bytes of arrays of one dtype, coded as one sequence."""
    flat = np.concatenate([np.ascontiguousarray(a).reshape(-1) for a in arrays])
    if flat.dtype.name not in DTYPES:
        raise FileError(f"A tensor of dtype {flat.dtype.name}.", ", ".join(DTYPES), "cast it first.")
    raw = flat.astype(flat.dtype.newbyteorder("<"), copy=False)
    found = [bytes([RAW]) + raw.tobytes()]
    if flat.size:
        found.append(bytes([PLANES]) + compress(raw.view(np.uint8).reshape(flat.size, -1).T.tobytes()))
        if flat.dtype.kind != "f":
            low, high = int(flat.min()), int(flat.max())
            if high - low < 1024:
                levels = (flat.astype(np.int64) - low).astype(np.int32)
                found.append(struct.pack("<BqH", SYMBOLS, low, high - low) + symbols.encode(levels, max(2, high - low + 1)))
    return min(found, key=len)


def decode_all(data: bytes | memoryview, dtype: str, shapes: Sequence[Sequence[int]]) -> list[Array]:
    kind, counts = np.dtype(dtype).newbyteorder("<"), [int(np.prod(s, dtype=np.int64)) for s in shapes]
    total, body = sum(counts), memoryview(data)[1:]
    if data[0] == RAW:
        flat = np.frombuffer(body, kind, total).astype(dtype)
    elif data[0] == PLANES:
        planes = np.frombuffer(decompress(body, total * kind.itemsize), np.uint8)
        flat = np.ascontiguousarray(planes.reshape(kind.itemsize, total).T).view(kind).reshape(-1).astype(dtype)
    else:
        low, span = struct.unpack_from("<qH", body)
        flat = (symbols.decode(body[10:], total, max(2, span + 1)).astype(np.int64) + low).astype(dtype)
    ends = np.cumsum(counts)[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(flat, ends), shapes, strict=True)]


def compress(raw: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(level=9, write_content_size=False).compress(raw)


def decompress(data: bytes | memoryview, size: int) -> bytes:
    import zstandard

    return zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
