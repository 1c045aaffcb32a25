"""How a measuring process is spoken to over its pipes: length-prefixed frames of JSON and .npy arrays, no pickle."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Sequence
from typing import IO, Any

import numpy as np

from multum.errors import MultumError
from multum.runtime.engines import Array

_LENGTH = struct.Struct(">Q")
_LARGEST_HEADER = 1 << 20
_LARGEST_ARRAY = 1 << 34
_MOST_ARRAYS = 4096


def send(pipe: IO[bytes], header: dict[str, Any], arrays: Sequence[Array] = ()) -> None:
    frames = [json.dumps(header | {"arrays": len(arrays)}).encode()]
    for array in arrays:
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, array, allow_pickle=False)
        frames.append(buffer.getvalue())
    for frame in frames:
        pipe.write(_LENGTH.pack(len(frame)))
        pipe.write(frame)
    pipe.flush()


def receive(pipe: IO[bytes]) -> tuple[dict[str, Any], list[Array]] | None:
    """The next message, None when the other side has closed the pipe. Raises ``MultumError`` for anything that is no message."""
    start = pipe.read(_LENGTH.size)
    if not start:
        return None
    try:
        header: dict[str, Any] = json.loads(_frame(pipe, start, _LARGEST_HEADER))
        if not 0 <= header["arrays"] <= _MOST_ARRAYS:
            raise ValueError(f"{header['arrays']} arrays")
        frames = [io.BytesIO(_frame(pipe, pipe.read(_LENGTH.size), _LARGEST_ARRAY)) for _ in range(header["arrays"])]
        return header, [np.lib.format.read_array(frame, allow_pickle=False) for frame in frames]
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise MultumError(f"A measuring process sent what is no message: {error}.", "frames of JSON and arrays") from error


def _frame(pipe: IO[bytes], start: bytes, largest: int) -> bytes:
    (length,) = _LENGTH.unpack(start)
    if length > largest:
        raise ValueError(f"a frame of {length} bytes")
    frame = pipe.read(length)
    if len(frame) < length:
        raise ValueError(f"a frame that ends after {len(frame)} of {length} bytes")
    return frame
