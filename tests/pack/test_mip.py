"""The container: what is written is read back, nothing else is accepted, and a write that fails leaves no trace."""

import errno
import json
import os
import struct
import tempfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from multum.errors import FileError
from multum.pack import coder, mip

META = {"graph": [["conv", 1, 2.5, None, True]], "name": "naïve ☃"}


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "conv.weight": np.clip(rng.laplace(0, 1.5, (8, 4, 3, 3)).round(), -8, 7).astype(np.int8),
        "conv.bias": rng.normal(size=8).astype(np.float32),
        "conv.scale": np.abs(rng.normal(size=(8, 1, 1, 1))).astype(np.float32),
        "steps": np.array(17),
        "half": rng.normal(size=5).astype(np.float16),
        "mask": rng.random(9) < 0.5,
        "empty": np.zeros((0, 3), np.float32),
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    mip.write(tmp_path / "model.mip", META, tensors())
    return tmp_path / "model.mip"


def read_all(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    meta, found = mip.read(path)
    return meta, {name: found[name] for name in found}


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    bits = [{n: (a.dtype, a.shape, a.tobytes()) for n, a in each.items()} for each in (found, expected)]
    return bits[0] == bits[1]


def forge(path: Path, change, *, data: bytes | None = None) -> None:
    """Rewrites the header, with right lengths and checksums, as an attacker would."""
    old = path.read_bytes()
    packed_size, plain_size, _ = struct.unpack("<III", old[-12:])
    body = old[: -12 - packed_size] if data is None else old[:10] + data
    header = json.loads(coder.decompress(old[-12 - packed_size : -12], plain_size, words=True))
    text = change(header)
    plain = text if isinstance(text, bytes) else json.dumps(header).encode()
    packed = coder.compress(plain)
    lengths = struct.pack("<II", len(packed), len(plain))
    path.write_bytes(body + packed + lengths + struct.pack("<I", zlib.crc32(old[:10] + packed + lengths)))


def test_round_trip(path):
    meta, found = read_all(path)
    assert meta == META == mip.read_meta(path)
    assert same(found, tensors())


def test_write_returns_the_size_and_is_deterministic(path, tmp_path):
    assert mip.write(tmp_path / "again.mip", META, tensors()) == os.path.getsize(path)
    assert (tmp_path / "again.mip").read_bytes() == path.read_bytes()


def test_a_file_can_be_written_over_while_it_is_read(path):
    _, found = mip.read(path)
    mip.write(path, {"new": 1}, found)
    assert mip.read_meta(path) == {"new": 1}
    assert same({name: found[name] for name in found}, tensors())


def test_what_is_read_belongs_to_the_reader(path):
    _, found = mip.read(path)
    for name in found:
        found[name][...] = 0
    assert same(dict(found), tensors())


def test_the_order_of_names_is_kept_across_streams(tmp_path):
    names = ["z", "a.weight", "m", "a.bias", "b"]
    arrays = [np.arange(3), np.ones((2, 2), np.float32), np.arange(9), np.ones(4, np.float32), np.zeros((1 << 15, 2), np.float32)]
    mip.write(tmp_path / "x.mip", {}, dict(zip(names, arrays, strict=True)))
    assert list(mip.read(tmp_path / "x.mip")[1]) == list(mip.sizes(tmp_path / "x.mip")) == names


def test_a_name_of_any_length_and_script_is_kept(tmp_path):
    names = ["x" * 512, "x" * 511 + "y", "x" * 200, "größe", "größer", "☃", "☃☃", '"quoted"', "5", "55"]
    mip.write(tmp_path / "x.mip", {}, {name: np.full(3, i) for i, name in enumerate(names)})
    found = mip.read(tmp_path / "x.mip")[1]
    assert {name: int(found[name][0]) for name in found} == {name: i for i, name in enumerate(names)}


def test_a_tensor_that_is_decoded_otherwise_than_it_was_coded_is_noticed(path, monkeypatch):
    """As on a machine that computes otherwise: the bytes of the file are right, what comes of them is not."""
    decode_all = coder.decode_all
    monkeypatch.setattr(coder, "decode_all", lambda *args: [a + 1 if a.dtype == np.int8 else a for a in decode_all(*args)])
    found = mip.read(path)[1]
    assert found["conv.bias"].size == 8
    with pytest.raises(FileError, match=r"the checksum of 'conv\.weight' is wrong"):
        found["conv.weight"]


def test_a_dictionary_of_a_newer_version_is_named(path, monkeypatch):
    monkeypatch.setattr(coder, "_words", lambda number: (_ for _ in ()).throw(ValueError(f"it needs the dictionary {number}")))
    with pytest.raises(FileError, match=rf"needs the dictionary {coder.WORDS}"):
        mip.read(path)


def test_a_name_that_is_not_there_is_a_key_error(path):
    with pytest.raises(KeyError):
        mip.read(path)[1]["conv"]


def test_sizes_add_up_to_the_file_but_its_header(path):
    sizes = mip.sizes(path)
    packed = struct.unpack("<I", path.read_bytes()[-12:-8])[0]
    assert sizes.keys() == tensors().keys()
    assert sum(sizes.values()) + packed + 22 == os.path.getsize(path)
    assert sizes["conv.weight"] > sizes["conv.bias"] > 0 == sizes["empty"]


def test_names_and_table_of_a_small_net_are_cheap(tmp_path):
    """Everything but the tensors of a 60-tensor net with a graph of 70 nodes takes 0.6 KB at most."""
    names = [f"blocks.{b}.conv{c}.{what}" for b in range(10) for c in (1, 2) for what in ("weight", "bias", "scale")]
    nodes = [["call", f"aten.conv2d.default{i % 3}", [f"%{i}", names[i % 60]], [1, 1]] for i in range(70)]
    size = mip.write(tmp_path / "x.mip", {"nodes": nodes}, {name: np.ones(16 + i, np.float32) for i, name in enumerate(names)})
    assert size - sum(mip.sizes(tmp_path / "x.mip").values()) < 600


@pytest.mark.parametrize("meta", [{"a": float("nan")}, {"a": float("inf")}, {"a": np.zeros(2)}, {"a": {1, 2}}])
def test_meta_that_json_cannot_hold_is_refused(tmp_path, meta):
    with pytest.raises(FileError, match=r"cannot be written as JSON.*\nExpected"):
        mip.write(tmp_path / "x.mip", meta, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "a\n", "../etc/passwd", "a/../b", "a\\b", "\x00", "x" * 513, 3])
def test_bad_names_are_refused_when_written_and_when_read(path, tmp_path, name):
    with pytest.raises(FileError, match="name"):
        mip.write(tmp_path / "x.mip", {}, {name: np.zeros(1)})
    forge(path, lambda header: header["names"].__setitem__(0, name if name == 3 else f"0{name}"))
    with pytest.raises(FileError, match="name"):
        mip.read(path)


def test_a_missing_file_or_folder(tmp_path):
    for call in (mip.read, mip.read_meta, mip.sizes):
        with pytest.raises(FileError, match=r"(?s)none\.mip.*No such file.*Expected"):
            call(tmp_path / "none.mip")
        with pytest.raises(FileError, match="directory"):
            call(tmp_path)
    with pytest.raises(FileError, match="No such file"):
        mip.write(tmp_path / "none" / "x.mip", {}, {})


def test_another_file(tmp_path):
    (tmp_path / "x").write_bytes(b"PK\x03\x04" * 30)
    with pytest.raises(FileError, match=r"not a \.mip file"):
        mip.read(tmp_path / "x")


@pytest.mark.parametrize(("other", "do"), [(mip.MAJOR + 1, "upgrade"), (mip.MAJOR - 1, "make it again")])
def test_a_file_of_another_version_says_what_to_do(path, other, do):
    data = bytearray(path.read_bytes())
    data[8] = other
    path.write_bytes(data)
    for call in (mip.read, mip.read_meta, mip.sizes):
        with pytest.raises(FileError, match=rf"(?s)version {other}\.0.*Expected: version {mip.MAJOR}.*{do}"):
            call(path)


def test_a_newer_minor_version_with_unknown_keys_is_read(path):
    data = bytearray(path.read_bytes())
    data[9] = 7
    path.write_bytes(data)
    forge(path, lambda header: header.update(author={"unknown": 1}))
    assert same(read_all(path)[1], tensors())


def test_a_file_cut_anywhere_is_refused(path):
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(FileError):
            read_all(path)


def test_a_flipped_bit_anywhere_is_noticed(path):
    mip.write(path, {"a": 1}, {name: array for name, array in tensors().items() if name in ("conv.bias", "half")})
    data = path.read_bytes()
    for place in range(8 * len(data)):
        wrong = bytearray(data)
        wrong[place // 8] ^= 1 << place % 8
        path.write_bytes(wrong)
        with pytest.raises(FileError):
            read_all(path)


def test_bytes_behind_the_end_are_refused(path):
    path.write_bytes(path.read_bytes() + b"\x00")
    with pytest.raises(FileError):
        mip.read(path)


def with_meta(header: dict, text: str) -> bytes:
    """The header with other text as its meta data, and right in all else."""
    return json.dumps(header | {"meta": "META"}).replace('"META"', text).encode()


def test_meta_that_is_only_other_is_accepted(path):
    """So what the forged headers below are refused for is what they say."""
    forge(path, lambda header: with_meta(header, '{"a":[[1e99]]}'))
    assert mip.read_meta(path) == {"a": [[1e99]]}


def first(header: dict) -> list:
    return header["streams"][0]


@pytest.mark.parametrize(
    "change",
    [
        lambda h: first(h).__setitem__(0, first(h)[0] + 1),
        lambda h: first(h).__setitem__(0, -1),
        lambda h: first(h).__setitem__(0, 1 << 70),
        lambda h: first(h).__setitem__(0, 1.0),
        lambda h: first(h).__setitem__(1, -5),
        lambda h: first(h).__setitem__(2, "object"),
        lambda h: first(h).__setitem__(2, ["int8"]),
        lambda h: first(h).append(1),
        lambda h: h["shapes"].__setitem__(0, [-1]),
        lambda h: h["shapes"].__setitem__(0, [True]),
        lambda h: h["shapes"].__setitem__(0, [1 << 62]),
        lambda h: h["shapes"].__setitem__(0, [1] * 65),
        lambda h: h["shapes"].__setitem__(0, [1 << 40, 1 << 40]),
        lambda h: h["shapes"].__setitem__(0, "ab"),
        lambda h: h["shapes"].pop(),
        lambda h: h["places"].pop(),
        lambda h: h["places"].__setitem__(0, 99),
        lambda h: h["places"].__setitem__(0, -1),
        lambda h: h["places"].__setitem__(0, True),
        lambda h: h.__setitem__("places", [0] * len(h["places"])),
        lambda h: h["names"].__setitem__(1, h["names"][0]),
        lambda h: h["names"].__setitem__(0, "5a"),
        lambda h: h["names"].__setitem__(0, "/a"),
        lambda h: h["names"].__setitem__(0, ""),
        lambda h: h.__setitem__("names", "abc"),
        lambda h: h.__setitem__("streams", {}),
        lambda h: h.__setitem__("streams", [7]),
        lambda h: h.__setitem__("padding", -3),
        lambda h: h.pop("streams"),
        lambda h: h.pop("meta"),
        lambda h: h.__setitem__("meta", []),
        lambda h: b"[]",
        lambda h: b"{",
        lambda h: b"\xff\xfe",
        lambda h: with_meta(h, '{"a":NaN}'),
        lambda h: with_meta(h, '{"a":-Infinity}'),
        lambda h: with_meta(h, '{"a":1e999}'),
        lambda h: with_meta(h, '{"a":1,"a":2}'),
        lambda h: with_meta(h, '{"a":' + "9" * 5000 + "}"),
        lambda h: with_meta(h, '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"),
    ],
)
def test_a_forged_header_is_refused_before_any_tensor(path, change):
    forge(path, change)
    with pytest.raises(FileError, match=r"damaged.*\nExpected"):
        mip.read(path)


def test_a_header_of_a_forged_length_is_not_unpacked(path):
    data = bytearray(path.read_bytes())
    for packed, plain in ((2**32 - 1, 10), (10, 2**32 - 1), (len(data), 10), (0, 0)):
        wrong = data[:-12] + struct.pack("<II", packed, plain)
        path.write_bytes(wrong + struct.pack("<I", 0))
        with pytest.raises(FileError):
            mip.read(path)


@pytest.mark.parametrize("packed", [coder.compress(b"{}" * 50, words=True)[:-3], coder.compress(b"", words=True), b"no frame"])
def test_a_header_that_does_not_unpack_is_refused(path, packed):
    head, lengths = path.read_bytes()[:10], struct.pack("<II", len(packed), 0)
    path.write_bytes(head + packed + lengths + struct.pack("<I", zlib.crc32(head + packed + lengths)))
    with pytest.raises(FileError, match="makes no sense"):
        mip.read(path)


def test_a_bomb_is_refused_before_memory_is_taken(path):
    payload = bytes([coder.PLANES]) + coder.compress(bytes(1 << 24))
    bomb = {"streams": [[len(payload), zlib.crc32(payload), "uint8"]], "names": ["0x"], "shapes": [[1 << 33]], "places": [0]}
    forge(path, lambda header: header.update(bomb), data=payload)
    with pytest.raises(FileError, match="cannot hold the 8589934592"):
        mip.read(path)
    bomb["shapes"] = [[1000]]
    forge(path, lambda header: header.update(bomb), data=payload)
    tracemalloc.start()
    with pytest.raises(FileError):
        mip.read(path)[1]["x"]
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_the_limit_of_the_caller_counts(path):
    total = sum(a.nbytes for a in tensors().values())
    mip.read(path, limit_bytes=total)
    with pytest.raises(FileError, match=rf"holds {total} bytes.*\nExpected: at most {total - 1}"):
        mip.read(path, limit_bytes=total - 1)


def test_what_is_very_redundant_can_still_be_read(tmp_path, monkeypatch):
    """Zeros compress beyond what a reader believes; the writer pads the file."""
    monkeypatch.setattr(mip, "_FREE", 1 << 16)
    zeros = np.zeros(1 << 21, np.float32)
    size = mip.write(tmp_path / "x.mip", {}, {"zeros": zeros})
    assert zeros.nbytes // 1024 - 64 <= size < zeros.nbytes // 1000
    assert same(read_all(tmp_path / "x.mip")[1], {"zeros": zeros})
    assert mip.sizes(tmp_path / "x.mip")["zeros"] < 500


class Failing(dict):
    """Tensors whose second one cannot be had."""

    def __init__(self, error: BaseException):
        super().__init__(a=np.zeros(100_000), b=np.zeros(3))
        self.error = error

    def items(self):
        yield "a", self["a"]
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(path, error):
    before = path.read_bytes()
    with pytest.raises(FileError if isinstance(error, OSError) else type(error)):
        mip.write(path, {}, Failing(error))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_at_the_last_moment(path, monkeypatch, step):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = path.read_bytes()
    monkeypatch.setattr(os, step, full)
    with pytest.raises(FileError, match=r"could not be written: No space left.*\nDo: free space"):
        mip.write(path, {}, tensors())
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device(path, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr(tempfile, "mkstemp", lambda **_: (os.open("/dev/full", os.O_WRONLY), str(path.parent / "temporary")))
    with pytest.raises(FileError, match="No space left"):
        mip.write(path, {}, tensors())
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", ["int8", "float32"])
def test_memory_is_bounded_by_the_largest_tensor(tmp_path, kind):
    """Writing adds at most twice the largest tensor (an int8 one counts as the float32 one that it stands for), whatever their number."""
    rng = np.random.default_rng(0)
    one = rng.normal(0, 2, (1000, 1000)).round().astype(kind) if kind == "int8" else rng.normal(0, 2, (1000, 1000)).astype(kind)
    largest, fixed = 4 * one.size, 4 << 20
    tracemalloc.start()
    mip.write(tmp_path / "x.mip", {}, {f"t{i}": one for i in range(3)})
    written = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    _, found = mip.read(tmp_path / "x.mip")
    for name in found:
        assert found[name][0, 0] == one[0, 0]
    read = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert written < 2 * largest + fixed
    assert read < 3 * largest + fixed  # with the decoded tensor itself
