"""Any ONNX file in a `.mip` file, and back: the same operators, the same bits of every tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FileError
from . import mip
from .whole import whole

FORMAT = "onnx"
_SKELETON = "model"  # the array that holds everything but the tensors
_LEAST = 64  # bytes of a tensor that is coded by itself
_LARGEST = (1 << 31) - 1  # bytes of a protobuf message; a larger model needs a second file
_ALIGNED = 4096  # where a tensor may begin in that file, so that runtimes can map it
# How the bytes of a tensor are read: by ONNX's number of its type. bfloat16 is uint16, numbers of four bits are taken apart.
_TYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "uint8", 10: "float16", 11: "float64",
    12: "uint32", 13: "uint64", 16: "uint16", 17: "uint8", 18: "uint8", 19: "uint8", 20: "uint8", 21: "uint8", 22: "int8",
}  # fmt: skip
_NIBBLES = (21, 22)
_LISTS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
Array = NDArray[Any]
Tell = Callable[[str], None]
Path_ = str | Path


def pack(source: Path_, path: Path_, *, tell: Tell = lambda message: None) -> int:
    """Writes an ONNX model as one `.mip` file and returns its size in bytes; every tensor is read back before that.

    Nothing is left out or rounded: `unpack` gives a model with the same operators, attributes and bits. Tensors beside the model
    (external data) come into the file. `tell` is told how far the work is. Raises FileError when `source` is no ONNX file or `path`
    cannot be written.
    """
    _differ(source, path)
    found = _Taken(_load(Path(source)))
    size = mip.write(path, {"format": FORMAT, "taken": found.marks}, _Told(found, found.size, tell))
    arrays = mip.read(path)[1]
    for name in arrays:
        arrays[name]
    tell("every tensor was read back")
    return size


def unpack(path: Path_, target: Path_, *, tell: Tell = lambda message: None) -> int:
    """Writes the ONNX model that `pack` packed and returns its size in bytes, with that of its external data.

    A model beyond 2 GiB keeps its tensors in `target` + ".data", as ONNX asks for. Raises FileError when `path` holds something else,
    is damaged, or `target` cannot be written.
    """
    _differ(path, target)
    meta, arrays = mip.read(path)
    if meta.get("format") != FORMAT:
        given = f"{str(path)!r} holds {meta.get('format')!r}, not an ONNX file."
        raise FileError(given, "a file written by multum pack", f"for a model of multum: multum export {path} --to onnx")
    try:
        model, chosen = _chosen(arrays, meta["taken"])
    except _unreadable() as error:
        raise FileError(f"The ONNX model in {str(path)!r} is damaged ({error}).", "a file written by multum pack") from error
    return _write(model, _Told(arrays, sum(map(_bytes, chosen.values())), tell), chosen, Path(target))


def _differ(source: Path_, target: Path_) -> None:
    if Path(target).exists() and Path(source).exists() and Path(target).samefile(source):
        raise FileError(f"{source} would be written over with what is made of it.", "another file to write")


def _load(source: Path) -> Any:
    import onnx

    try:
        model = onnx.load(str(source), format="protobuf")
    except OSError as error:
        raise FileError(f"{source} cannot be read: {error.strerror or error}.", "an ONNX file") from error
    except _unreadable() as error:
        raise FileError(f"{source} is not an ONNX file: {str(error)[:200]}", "a model as ONNX exporters write it") from error
    if not model.HasField("graph"):
        raise FileError(f"{source} is not an ONNX file: it has no graph.", "a model as ONNX exporters write it")
    return model


def _unreadable() -> tuple[type[Exception], ...]:
    """What reading a damaged model raises."""
    from google.protobuf.message import DecodeError
    from onnx.checker import ValidationError

    return KeyError, TypeError, ValueError, DecodeError, ValidationError


def _tensors(message: Any) -> Iterator[Any]:
    """Every tensor in a message, also those of attributes, subgraphs and functions, in a fixed order."""
    from google.protobuf.message import Message

    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for part in [value] if isinstance(value, Message) else value:
            if part.DESCRIPTOR.name == "TensorProto":
                yield part
            else:
                yield from _tensors(part)


def _chosen(arrays: Mapping[str, Array], marks: str) -> tuple[Any, dict[str, Any]]:
    """The model without its large tensors, and these, empty, by the names of their arrays."""
    import onnx

    model = onnx.ModelProto.FromString(arrays[_SKELETON].tobytes())
    chosen = [tensor for tensor, mark in zip(_tensors(model), marks, strict=True) if mark == "1"]
    names = [name for name in arrays if name != _SKELETON]
    if not all(tensor.data_type in _TYPES and min(tensor.dims, default=0) >= 0 for tensor in chosen):
        raise ValueError("a tensor of another type or an impossible shape")
    return model, dict(zip(names, chosen, strict=True))


def _write(model: Any, arrays: Mapping[str, Array], chosen: Mapping[str, Any], target: Path) -> int:
    """Fills in the tensors and writes the model; gives the bytes on the disk."""
    import onnx

    size = 0
    if model.ByteSize() + sum(_bytes(tensor) + len(name) + 64 for name, tensor in chosen.items()) < _LARGEST:
        for name, tensor in chosen.items():
            tensor.raw_data = _joined(arrays[name], tensor)
    else:
        data = target.with_name(f"{target.name}.data")
        with whole(data) as file:
            for name, tensor in chosen.items():
                file.write(bytes(-file.tell() % _ALIGNED))
                tensor.data_location = onnx.TensorProto.EXTERNAL
                for key, value in (("location", data.name), ("offset", file.tell()), ("length", _bytes(tensor))):
                    tensor.external_data.add(key=key, value=str(value))
                file.write(_joined(arrays[name], tensor))
            size = file.tell()
    plain = model.SerializeToString()
    with whole(target) as file:
        file.write(plain)
    return size + len(plain)


def _pack_list(tensor: Any) -> None:
    """Makes bytes of a tensor that is a list of numbers."""
    from onnx import numpy_helper

    if tensor.data_type not in _TYPES or not any(len(getattr(tensor, field)) for field in _LISTS):
        return
    try:
        raw = numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data
    except (ValueError, TypeError) as error:
        raise FileError(f"The tensor {tensor.name!r} is damaged: {error}.", "as many numbers as its shape says") from error
    if len(raw) >= _LEAST:
        for field in _LISTS:
            tensor.ClearField(field)
        tensor.raw_data = raw


def _bytes(tensor: Any) -> int:
    count: int = math.prod(tensor.dims)
    return -(-count // 2) if tensor.data_type in _NIBBLES else count * np.dtype(_TYPES[tensor.data_type]).itemsize


def _takes(tensor: Any) -> bool:
    """Whether a tensor is coded by itself: its bytes are as many as its shape says, and no bits are hidden behind the last number."""
    if tensor.data_type not in _TYPES or min(tensor.dims, default=0) < 0 or _bytes(tensor) < _LEAST:
        return False
    raw = tensor.raw_data
    return len(raw) == _bytes(tensor) and not (tensor.data_type in _NIBBLES and math.prod(tensor.dims) % 2 and raw[-1] >> 4)


def _split(raw: bytes, tensor: Any) -> Array:
    kind = np.dtype(_TYPES[tensor.data_type])
    if tensor.data_type not in _NIBBLES:
        return np.frombuffer(raw, kind.newbyteorder("<")).reshape(tuple(tensor.dims))
    both = np.frombuffer(raw, np.uint8)
    numbers = np.stack([both & 15, both >> 4], 1).reshape(-1)[: math.prod(tensor.dims)].reshape(tuple(tensor.dims))
    return (numbers.astype(np.int8) ^ 8) - 8 if kind == np.int8 else numbers


def _joined(array: Array, tensor: Any) -> bytes:
    if array.shape != tuple(tensor.dims) or array.dtype != _TYPES[tensor.data_type]:
        given = f"A tensor of {array.dtype} {list(array.shape)} is packed as {tensor.name!r}."
        raise FileError(given, f"{_TYPES[tensor.data_type]} {list(tensor.dims)}", "the file is forged or damaged.")
    if tensor.data_type not in _NIBBLES:
        return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    numbers = np.append(array.reshape(-1), np.zeros(array.size % 2, array.dtype)).view(np.uint8) & 15
    return (numbers[::2] | numbers[1::2] << 4).tobytes()


class _Told(Mapping[str, Array]):
    """Arrays of so many bytes together; says how far they are gone through."""

    def __init__(self, arrays: Mapping[str, Array], total: int, tell: Tell):
        self._arrays, self._total, self._tell, self._done = arrays, max(1, total), tell, 0

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __getitem__(self, name: str) -> Array:
        array = self._arrays[name]
        before, self._done = self._done, self._done + array.nbytes
        if 10 * before // self._total < 10 * self._done // self._total:
            self._tell(f"{100 * before // self._total} % of {self._total / 1e6:.1f} MB")
        return array


class _Taken(Mapping[str, Array]):
    """What the file holds: the model without its large tensors, then these, one at a time; each can be had once."""

    def __init__(self, model: Any):
        self._model = model
        self._tensors, self._raw = dict[str, Any](), dict[str, bytes]()
        marks = []
        for index, tensor in enumerate(_tensors(model)):
            _pack_list(tensor)
            marks.append(_takes(tensor))
            if marks[-1]:
                name = tensor.name if mip.can_name(tensor.name) and tensor.name not in {_SKELETON, *self._tensors} else f"#{index}"
                self._tensors[name], self._raw[name] = tensor, tensor.raw_data
                tensor.ClearField("raw_data")
        self.marks = "".join("01"[mark] for mark in marks)
        self.size = sum(map(len, self._raw.values()))

    def __iter__(self) -> Iterator[str]:
        return iter([_SKELETON, *self._tensors])

    def __len__(self) -> int:
        return 1 + len(self._tensors)

    def __getitem__(self, name: str) -> Array:
        if name == _SKELETON:
            return np.frombuffer(self._model.SerializeToString(deterministic=True), np.uint8)
        return _split(self._raw.pop(name), self._tensors[name])
