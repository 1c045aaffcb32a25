"""The ``.mip`` container: one file that holds JSON and arrays.

    magic [8], major [1], minor [1]
    streams, one after the other: each holds one array, or many small ones of one dtype coded as one sequence
    padding (only where the arrays are so redundant that the file would look like a decompression bomb)
    header: JSON, a zstandard frame
    footer: length of the packed header [4], of the plain header [4], CRC-32 of all bytes but the streams and padding [4]

The header is last so that writing needs neither a second pass nor a second file. It holds the caller's ``meta``; of each stream the
length, the dtype, and the CRC-32 of its bytes followed by those of the arrays in it, so that an array that was decoded otherwise than
it was coded is noticed too; and of each array the name, shape and stream. Offsets are sums of lengths: parts cannot overlap or leave gaps.
A name says with its first letter how much it shares with the name before: ``0`` nothing, ``1`` a letter. The zstandard frame names the
dictionary that it was made with; a version of the format knows the dictionaries of those before.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import FileError
from . import coder
from .whole import whole

MAGIC, MAJOR, MINOR = b"\x89MIP\r\n\x1a\n", 4, 0
_HEAD, _FOOT = struct.Struct("<8sBB"), struct.Struct("<III")
_NAME = re.compile(r"[^\x00-\x1f\x7f\\]{1,512}")
_HEADER_LIMIT = 1 << 28  # bytes of the plain header
_SMALL, _SHARED = 1 << 16, 1 << 20  # bytes: a smaller array shares a stream with others of its kind; a stream is full
_FREE, _RATIO = 1 << 28, 1024  # a file may declare _FREE bytes of arrays, and _RATIO more for each byte that it has
_RANK = 64
_SAME = 64  # letters at most that a name shares with the one before
_KEPT = 8  # shared streams that stay decoded
Array = NDArray[Any]
Path_ = str | os.PathLike[str]


@dataclass(frozen=True)
class _Stream:
    offset: int
    length: int
    checksum: int
    dtype: str
    names: list[str]
    shapes: list[tuple[int, ...]]

    @property
    def raw(self) -> list[int]:
        """Bytes of each decoded array."""
        return [math.prod(shape) * np.dtype(self.dtype).itemsize for shape in self.shapes]


def write(path: Path_, meta: Mapping[str, Any], tensors: Mapping[str, Array]) -> int:
    """Writes the file and returns its size in bytes. ``meta`` is anything that JSON can hold.

    The file appears under its name only when it is whole and on the disk; until then a file of that name stays as it is.
    Arrays are taken from ``tensors`` one at a time, in its order.
    """
    with whole(Path(path)) as file:
        return _write(file, meta, tensors)


def _write(file: BinaryIO, meta: Mapping[str, Any], tensors: Mapping[str, Array]) -> int:
    head, streams, raw = _HEAD.pack(MAGIC, MAJOR, MINOR), list[list[Any]](), 0
    shapes, places = dict[str, list[int]](), dict[str, int]()
    file.write(head)
    for names, arrays in _grouped(tensors, shapes):
        length, checksum = 0, 0
        for part in coder.encode_all(arrays):
            file.write(part)
            length, checksum = length + len(part), zlib.crc32(part, checksum)
        places |= dict.fromkeys(names, len(streams))
        streams.append([length, _checksum(arrays, checksum), arrays[0].dtype.name])
        raw += sum(a.nbytes for a in arrays)
    padding = max(0, -(-(raw - _FREE) // _RATIO) - file.tell())
    file.write(bytes(padding))
    table = {"names": _fold(shapes), "shapes": list(shapes.values()), "places": [places[name] for name in shapes], "streams": streams}
    plain = _dump({"meta": meta, **table} | ({"padding": padding} if padding else {}))
    if len(plain) > _HEADER_LIMIT:
        raise FileError(f"Meta data and names of {len(plain)} bytes.", f"at most {_HEADER_LIMIT}", "store what is large as a tensor.")
    packed = coder.compress(plain, words=True)
    lengths = struct.pack("<II", len(packed), len(plain))
    file.write(packed + lengths + struct.pack("<I", zlib.crc32(head + packed + lengths)))
    return file.tell()


def _checksum(arrays: Iterable[Array], start: int) -> int:
    """The CRC-32 of the elements, little-endian."""
    for array in arrays:
        flat = np.ascontiguousarray(array).reshape(-1)
        start = zlib.crc32(flat.astype(flat.dtype.newbyteorder("<"), copy=False).data, start)
    return start


def _fold(names: Iterable[str]) -> list[str]:
    """Each name without what it shares with the one before, and in front of it how many letters that are."""
    folded, last = [], ""
    for name in names:
        same = next((i for i, (a, b) in enumerate(zip(last[:_SAME], name, strict=False)) if a != b), min(len(last), len(name), _SAME))
        folded.append(f"{chr(ord('0') + same)}{name[same:]}")
        last = name
    return folded


def _unfold(folded: Iterable[str]) -> list[str]:
    names, last = list[str](), ""
    for name in folded:
        same = ord(name[0]) - ord("0")
        if not 0 <= same <= len(last):
            raise ValueError(f"{name!r} shares more than there is")
        last = last[:same] + name[1:]
        names.append(last)
    return names


def _grouped(tensors: Mapping[str, Array], shapes: dict[str, list[int]]) -> Iterator[tuple[list[str], list[Array]]]:
    """The arrays by stream: a large one alone; small ones of one dtype together, vectors, weights and constants apart. Notes all shapes."""
    pending: dict[tuple[str, int], tuple[list[str], list[Array]]] = {}
    for name, array in tensors.items():
        _check_name(name)
        shapes[name] = list(array.shape)
        if array.nbytes >= _SMALL:
            yield [name], [array]
            continue
        kind = array.dtype.name, 2 if coder.constant(array) else int(array.ndim > 1)
        names, arrays = pending.setdefault(kind, ([], []))
        names.append(name)
        arrays.append(array)
        if sum(a.nbytes for a in arrays) >= _SHARED:
            yield pending.pop(kind)
    yield from pending.values()


def _dump(header: dict[str, Any]) -> bytes:
    try:
        return json.dumps(header, allow_nan=False, separators=(",", ":"), ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise FileError(f"The meta data cannot be written as JSON: {error}.", "plain data without NaN or infinity") from error


def read_meta(path: Path_) -> dict[str, Any]:
    """The meta data alone; no array is read."""
    file, meta, _, _ = _open(path, None)
    file.close()
    return meta


def read(path: Path_, limit_bytes: int = 16 << 30) -> tuple[dict[str, Any], Mapping[str, Array]]:
    """The meta data and the arrays. An array is decoded, and its checksum verified, each time it is looked up.

    Raises ``FileError`` when the file is missing, damaged, from a newer version, or holds more than ``limit_bytes``.
    """
    file, meta, streams, names = _open(path, limit_bytes)
    return meta, _Tensors(str(path), file, streams, names)


def sizes(path: Path_, weights: Mapping[str, float] | None = None) -> dict[str, int]:
    """The coded bytes of each array. Arrays that share a stream share its bytes in proportion to `weights`, else to their raw size."""
    file, _, streams, names = _open(path, None)
    file.close()
    result = dict.fromkeys(names, 0)
    for stream in streams:
        parts = [weights[name] for name in stream.names] if weights else [float(size) for size in stream.raw]
        done, given = 0.0, 0
        for name, part in zip(stream.names, parts, strict=True):
            done += part
            upto = int(stream.length * done / max(sum(parts), 1e-9)) if name != stream.names[-1] else stream.length
            result[name], given = upto - given, upto
    return result


class _Tensors(Mapping[str, Array]):
    """Arrays of a file that stays open; decoded when looked up. Streams of many small arrays are decoded once."""

    def __init__(self, path: str, file: BinaryIO, streams: list[_Stream], names: list[str]):
        self._path, self._file, self._lock, self._names = path, file, Lock(), names
        self._place = {name: (stream, i) for stream in streams for i, name in enumerate(stream.names)}
        self._shared: dict[int, list[Array]] = {}  # decoded streams by their offset; the latest few
        weakref.finalize(self, file.close)

    def __getitem__(self, name: str) -> Array:
        stream, index = self._place[name]
        if len(stream.names) == 1:
            return self._decode(stream)[0]
        arrays = self._shared.get(stream.offset)
        if arrays is None:
            arrays = self._decode(stream)
            with self._lock:
                self._shared[stream.offset] = arrays
                if len(self._shared) > _KEPT:
                    del self._shared[next(iter(self._shared))]
        return arrays[index].copy()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _decode(self, stream: _Stream) -> list[Array]:
        with self._lock:
            self._file.seek(stream.offset)
            data = self._file.read(stream.length)
        if len(data) != stream.length:
            raise _damaged(self._path, f"{stream.names[0]!r} is cut off")
        try:
            arrays = coder.decode_all(data, stream.dtype, stream.shapes)
        except FileError as error:
            raise _damaged(self._path, f"{stream.names[0]!r} cannot be decoded ({error.given})") from error
        if _checksum(arrays, zlib.crc32(data)) != stream.checksum:
            raise _damaged(self._path, f"the checksum of {stream.names[0]!r} is wrong")
        return arrays


def _damaged(path: Path_, what: str) -> FileError:
    return FileError(f"{path} is damaged: {what}.", "a whole .mip file", "copy or make the file again.")


def _open(path: Path_, limit: int | None) -> tuple[BinaryIO, dict[str, Any], list[_Stream], list[str]]:
    try:
        file = open(path, "rb")  # noqa: SIM115 (the caller closes it)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}.", "a .mip file") from error
    try:
        meta, streams, names = _parse(path, file, limit)
    except BaseException as error:
        file.close()
        if isinstance(error, OSError):
            raise FileError(f"{path} cannot be read: {error.strerror or error}.", "a .mip file") from error
        raise
    return file, meta, streams, names


def _parse(path: Path_, file: BinaryIO, limit: int | None) -> tuple[dict[str, Any], list[_Stream], list[str]]:
    total = os.fstat(file.fileno()).st_size
    head = file.read(_HEAD.size)
    if head[: len(MAGIC)] != MAGIC:
        raise FileError(f"{path} is not a .mip file.", "a file that multum wrote", "check the path.")
    if total < _HEAD.size + _FOOT.size:
        raise _damaged(path, "it is truncated")
    if head[8] != MAJOR:
        do = (
            "upgrade multum."
            if head[8] > MAJOR
            else "make it again, or use the multum that wrote it: a newer one does not read older formats."
        )
        raise FileError(f"{path} has format version {head[8]}.{head[9]}.", f"version {MAJOR}", do)
    file.seek(total - _FOOT.size)
    foot = file.read(_FOOT.size)
    packed_size, plain_size, checksum = _FOOT.unpack(foot)
    body = total - _FOOT.size - packed_size
    if body < _HEAD.size or plain_size > _HEADER_LIMIT:
        raise _damaged(path, "the length of its header is wrong")
    file.seek(body)
    packed = file.read(packed_size)
    if zlib.crc32(head + packed + foot[:8]) != checksum:
        raise _damaged(path, "the checksum of its header is wrong")
    try:
        header = _load(coder.decompress(packed, plain_size, words=True))
        streams, names = _streams(header, body)
        meta = _of(header.get("meta"), dict)
    except (KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
        raise _damaged(path, f"its header makes no sense ({error})") from error
    _check_sizes(path, streams, total, limit)
    return meta, streams, names


def _of(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{type(value).__name__} where {kind.__name__} is expected")
    return value


def _load(text: bytes) -> dict[str, Any]:
    def constant(name: str) -> None:
        raise ValueError(f"{name} is not a number")

    def number(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text} is out of range")
        return value

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(result := dict(items)) != len(items):
            raise ValueError("a key appears twice")
        return result

    header: dict[str, Any] = _of(json.loads(text, parse_constant=constant, parse_float=number, object_pairs_hook=pairs), dict)
    return header


def _streams(header: dict[str, Any], end: int) -> tuple[list[_Stream], list[str]]:
    streams, offset = list[_Stream](), _HEAD.size
    for length, checksum, dtype in _of(header["streams"], list):
        if dtype not in coder.DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}")
        if _of(length, int) < 0 or not 0 <= _of(checksum, int) < 1 << 32:
            raise ValueError("a stream has an impossible length or checksum")
        streams.append(_Stream(offset, length, checksum, dtype, [], []))
        offset += length
    padding = _of(header.get("padding", 0), int)
    if padding < 0 or offset + padding != end:
        raise ValueError("the lengths of its parts do not add up")
    names = _unfold(_of(header["names"], list))
    if len(set(names)) != len(names):
        raise ValueError("a name appears twice")
    for name, shape, place in zip(names, _of(header["shapes"], list), _of(header["places"], list), strict=True):
        _check_name(name)
        if len(_of(shape, list)) > _RANK or any(_of(n, int) < 0 or n > 1 << 48 for n in shape):
            raise ValueError(f"{name!r} has the shape {shape}")
        if not 0 <= _of(place, int) < len(streams):
            raise ValueError(f"{name!r} is in stream {place}")
        streams[place].names.append(name)
        streams[place].shapes.append(tuple(shape))
    if not all(stream.names for stream in streams):
        raise ValueError("a stream holds nothing")
    return streams, names


def can_name(name: Any) -> bool:
    """Whether an array can have this name: up to 512 characters, none of them a control character or backslash, and no path upwards."""
    return isinstance(name, str) and bool(_NAME.fullmatch(name)) and ".." not in name.split("/")


def _check_name(name: Any) -> None:
    if not can_name(name):
        given = f"A tensor with the name {str(name)[:80]!r}."
        raise FileError(given, "up to 512 characters, none of them a control character or backslash", "rename it.")


def _check_sizes(path: Path_, streams: list[_Stream], total: int, limit: int | None) -> None:
    declared = sum(sum(s.raw) for s in streams)
    if declared > _FREE + _RATIO * total:
        raise _damaged(path, f"{total} bytes cannot hold the {declared} that it declares")
    if limit is not None and declared > limit:
        raise FileError(f"{path} holds {declared} bytes of tensors.", f"at most {limit}", "pass a larger limit_bytes if you trust it.")
