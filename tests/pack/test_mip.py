"""The container: what is written is read back, and nothing else is accepted."""

import numpy as np

from multum import pack


def test_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {"w": rng.integers(-8, 8, (64, 32, 3, 3)).astype(np.int8), "b": rng.normal(size=64).astype(np.float32)}
    size = pack.write(tmp_path / "x.mip", {"a": [1, None]}, tensors)
    assert size == (tmp_path / "x.mip").stat().st_size
    meta, back = pack.read(tmp_path / "x.mip")
    assert meta == {"a": [1, None]} == pack.read_meta(tmp_path / "x.mip")
    assert {n: a.tobytes() for n, a in back.items()} == {n: a.tobytes() for n, a in tensors.items()}
