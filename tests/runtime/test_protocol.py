"""The pipe to a measuring process: what goes in comes out, and what is damaged is refused."""

import io
import json
import struct

import numpy as np
import pytest

from multum.errors import MultumError
from multum.runtime.protocol import receive, send


def test_messages_survive():
    pipe = io.BytesIO()
    arrays = [np.arange(6, dtype=np.int64).reshape(2, 3), np.float32(2.5).reshape(()), np.zeros((0, 4), bool)]
    send(pipe, {"do": "prepare", "options": {"path": "ü"}}, arrays)
    send(pipe, {"do": "sample"})
    pipe.seek(0)
    header, found = receive(pipe)
    assert header == {"do": "prepare", "options": {"path": "ü"}, "arrays": 3}
    assert all(a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b) for a, b in zip(arrays, found, strict=True))
    assert receive(pipe) == ({"do": "sample", "arrays": 0}, [])
    assert receive(pipe) is None


def frame(content: bytes) -> bytes:
    return struct.pack(">Q", len(content)) + content


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.array([{}], object), allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\0\0", "unpack requires"),
        (struct.pack(">Q", 1 << 40), "a frame of 1099511627776 bytes"),
        (struct.pack(">Q", 9) + b"{}", "a frame that ends after 2 of 9 bytes"),
        (frame(b"{"), "Expecting property name"),
        (frame(b"{}"), "'arrays'"),
        (frame(b'{"arrays": 100000}'), "100000 arrays"),
        (frame(b'{"arrays": -1}'), "-1 arrays"),
        (frame(b'{"arrays": 1}') + frame(b"no array"), "magic string"),
        (frame(b'{"arrays": 1}') + frame(pickled()), "allow_pickle=False"),
        (frame(json.dumps([1]).encode()), "list indices"),
    ],
)
def test_damaged_messages_are_refused(content, reason):
    with pytest.raises(MultumError, match="what is no message") as error:
        receive(io.BytesIO(content))
    assert reason in error.value.given
