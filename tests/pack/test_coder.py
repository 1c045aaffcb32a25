"""The codec: every bit comes back, and the coded size is near (or, where there is structure, below) what theory says."""

import tracemalloc

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from multum.errors import FileError
from multum.pack import coder


def back(array: np.ndarray) -> bytes:
    """Codes, decodes, compares bit by bit; gives the coded bytes."""
    coded = coder.encode(array)
    decoded = coder.decode(coded, array.dtype.name, array.shape)
    assert (decoded.dtype, decoded.shape) == (array.dtype.newbyteorder("="), array.shape)
    assert decoded.tobytes() == array.astype(decoded.dtype).tobytes()
    assert len(coded) <= array.nbytes + 1
    return coded


def entropy(array: np.ndarray) -> float:
    """Zero-order entropy in bytes."""
    counts = np.unique(array, return_counts=True)[1]
    return float(-(counts * np.log2(counts / array.size)).sum() / 8)


def laplace(count: int, scale: float = 1.5) -> np.ndarray:
    return np.clip(np.random.default_rng(count).laplace(0, scale, count).round(), -8, 7).astype(np.int8)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(coder.DTYPES).flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=6))))
def test_any_array_comes_back(array):
    back(array)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(coder.DTYPES), st.integers(0, 400), st.randoms(use_true_random=False))
def test_any_bits_come_back(dtype, count, random):
    """Among them NaN with payloads, infinities, both zeros and subnormal numbers."""
    if dtype == "bool":
        return
    back(np.frombuffer(random.randbytes(count * np.dtype(dtype).itemsize), dtype))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(coder.DTYPES), st.lists(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=7), min_size=1, max_size=6))
def test_arrays_coded_together_come_back(dtype, shapes):
    rng = np.random.default_rng(1)
    draws = [rng.laplace(0, 9, shape).round() if i % 2 else rng.exponential(2, shape) for i, shape in enumerate(shapes)]
    arrays = [draw.astype(dtype) for draw in draws]
    for old, new in zip(arrays, coder.decode_all(b"".join(coder.encode_all(arrays)), dtype, shapes), strict=True):
        assert (new.shape, new.tobytes()) == (old.shape, old.tobytes())


@pytest.mark.parametrize("array", [np.arange(60, dtype=np.float32).reshape(6, 10).T, np.arange(60)[::-3], np.arange(9, dtype=">i4")])
def test_views_and_byte_orders_come_back(array):
    back(array)


@pytest.mark.parametrize("low", [-(2**63), -(2**31), -(2**31) + 1, -1000, 0])
@pytest.mark.parametrize("high", [5, 40, 2**31 - 1, 2**31, 2**63 - 1])
def test_integers_of_any_range_come_back(low, high):
    back(np.array([low, high, 0, 3, low + 7, high - 5] * 40, np.int64))


def test_each_coding_is_used_where_it_is_best():
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 0.05, (64, 50)).astype(np.float32)
    found = {
        coder.RAW: np.frombuffer(rng.bytes(4000), np.int64),
        coder.PLANES: np.tile(np.frombuffer(rng.bytes(64), np.uint8), 100),
        coder.INTEGERS: laplace(3000),
        coder.FLOATS: weights,
        coder.CONSTANT: np.full((50, 60), -0.0, np.float32),
        coder.PALETTE: rng.normal(size=16).astype(np.float32)[rng.integers(0, 16, (50, 50))],
    }
    assert {coding: back(array)[0] for coding, array in found.items()} == {coding: coding for coding in found}


@pytest.mark.parametrize("count", [1_000, 10_000, 100_000, 1_000_000])
def test_symbols_without_structure_take_their_entropy(count):
    array = laplace(count)
    assert len(back(array)) <= 1.02 * entropy(array) + 8


def test_a_hundred_symbols_need_no_table():
    array = laplace(100)
    assert len(back(array)) <= entropy(array) + 11  # a table of 16 counts would take most of that


@pytest.mark.parametrize("shape", [(64, 1152), (64, 128, 3, 3)])
def test_scales_of_channels_are_learned(shape):
    """Symbols of channels with different scales take less than their joint entropy, close to the mean of their own."""
    rng = np.random.default_rng(0)
    scales = np.exp2(rng.uniform(-2, 2, (shape[0],) + (1,) * (len(shape) - 1)))
    array = np.clip((rng.laplace(0, 1, shape) * scales).round(), -16, 15).astype(np.int8)
    own = sum(entropy(row) for row in array)
    coded = len(back(array))
    assert coded < 1.05 * own
    assert coded < 0.93 * entropy(array)


def test_dead_kernels_and_smooth_kernels_are_learned():
    rng = np.random.default_rng(0)
    base = rng.laplace(0, 3, (64, 64, 1, 1)) * (rng.random((64, 64, 1, 1)) < 0.3)
    array = np.clip((base + rng.normal(0, 0.4, (64, 64, 3, 3))).round(), -8, 7).astype(np.int8)
    assert len(back(array)) < 0.75 * entropy(array)


def test_signs_of_neighbours_in_a_kernel_are_learned():
    """Kernels that vary slowly take far less than their entropy; the same numbers shuffled within each do not."""
    rng = np.random.default_rng(0)
    ramp = np.arange(5) / 4
    slopes, heights = rng.normal(0, 3, (2, 60, 40, 1, 1)), rng.normal(0, 2, (60, 40, 1, 1))
    smooth = heights + slopes[0] * ramp + slopes[1] * ramp[:, None] - slopes.sum(0) / 2
    array = np.clip((smooth + rng.normal(0, 0.3, smooth.shape)).round(), -8, 7).astype(np.int8)
    shuffled = rng.permuted(array.reshape(60, 40, 25), axis=2).reshape(array.shape)
    assert len(back(array)) < 0.75 * entropy(array)
    assert len(back(array)) < 0.85 * len(back(shuffled))


def test_how_many_are_pruned_and_how_large_the_others_are_is_learned_apart():
    """Each row has its own share of zeros and its own range of magnitudes."""
    rng = np.random.default_rng(0)
    share, least = rng.uniform(0.03, 0.3, (300, 1)), rng.integers(1, 6, (300, 1))
    magnitudes = (rng.random((300, 400)) < share) * rng.integers(least, least + 3, (300, 400))
    array = (magnitudes * rng.choice([-1, 1], magnitudes.shape)).astype(np.int8)
    own = sum(entropy(row) for row in array)
    assert len(back(array)) < 1.13 * own
    assert len(back(array)) < 0.93 * entropy(array)  # 0.96 with a single decision for each


@pytest.mark.parametrize("negative_zeros", [False, True])
def test_zeros_of_a_sparse_float_tensor_are_cheap(negative_zeros):
    """A tenth of the words is kept; a mask that multiplies leaves -0, whose sign is information too (1 bit each)."""
    rng = np.random.default_rng(0)
    weights, mask = rng.normal(0, 0.05, (256, 300)).astype(np.float32), rng.random((256, 300)) < 0.1
    array = weights * mask if negative_zeros else np.where(mask, weights, np.float32(0))
    assert len(back(array)) <= 0.15 * array.nbytes


def test_float_weights_take_less_and_rounded_ones_only_their_bits():
    rng = np.random.default_rng(0)
    weights = (rng.normal(0, 0.05, (128, 300)) * rng.uniform(0.5, 2, (128, 1))).astype(np.float32)
    words = weights.view(np.uint32)
    assert len(back(weights)) < 0.85 * weights.nbytes
    assert len(back((words >> 16).astype(np.uint16))) < 0.70 * weights.nbytes / 2
    assert len(back((words & 0xFFFF0000).view(np.float32))) < 0.36 * weights.nbytes  # bfloat16 inside float32
    assert len(back(np.abs(weights))) < len(back(weights)) - weights.size // 8 + 200  # no sign


def test_small_vectors_share_what_is_learned():
    rng = np.random.default_rng(0)
    vectors = [rng.normal(0, 0.1, 16 + i).astype(np.float32) for i in range(60)]
    together = sum(map(len, coder.encode_all(vectors)))
    assert together < 0.88 * sum(v.nbytes for v in vectors)
    assert together < sum(len(coder.encode(v)) for v in vectors) - 300


def test_small_integer_tensors_share_histograms():
    """What the first ones taught is not paid for again: all take the entropy of all."""
    tensors = [laplace(300 + i).reshape(-1, 1) for i in range(30)]
    assert sum(map(len, coder.encode_all(tensors))) <= 1.02 * entropy(np.concatenate(tensors)) + 8


@pytest.mark.parametrize("size", [0, 2, 4])
def test_a_frame_of_another_size_is_refused(size):
    assert coder.decompress(coder.compress(b"abc"), 3) == b"abc"
    with pytest.raises((ValueError, zstandard.ZstdError)):
        coder.decompress(coder.compress(b"abc"), size)


def test_the_format_stays_as_it_is():
    """Files of earlier versions must stay readable: these bytes were written by version 4.0."""
    array = np.array([[0, 1, -1, 0, 3], [0, 0, -2, 1, 0]], np.int8)
    assert coder.decode(GOLDEN_INTEGERS, "int8", (2, 5)).tolist() == array.tolist()
    kernels = np.zeros((4, 3, 3, 3), np.int8)
    kernels[::2, 1, :, 1] = 1, -1, 2
    kernels[1] = 1
    assert coder.decode(GOLDEN_KERNELS, "int8", (4, 3, 3, 3)).tolist() == kernels.tolist()
    assert coder.decode(GOLDEN_FLOATS, "float32", (4,)).tolist() == [0.5, -0.25, 0.0, 3.140625]


GOLDEN_INTEGERS = bytes.fromhex("02030a062ce7453da3")
GOLDEN_KERNELS = bytes.fromhex("0201060622804e2aec3714c3203d69dce6")
GOLDEN_FLOATS = bytes.fromhex("03002cfe0106083a28b6dd008049")


@pytest.mark.parametrize("dtype", ["complex64", "float128", "U4", "datetime64[s]", "object"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(FileError, match=r"dtype .*\nExpected: float32"):
        coder.encode(np.zeros(3, np.dtype(dtype)))


EDITS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=4)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 5), EDITS, st.integers(0, 400), st.binary(max_size=6))
def test_forged_streams_fail_cleanly(which, edits, cut, tail):
    array = FORGED[which]
    data = bytearray(coder.encode(array))
    for place, value in edits:
        data[place % len(data)] = value
    for shape in (array.shape, (7, 9), (10_000,), ()):
        try:
            decoded = coder.decode(bytes(data[: cut or None]) + tail, array.dtype.name, shape)
        except FileError:
            continue
        assert decoded.shape == shape


FORGED = [
    laplace(320).reshape(8, -1),
    laplace(300, 400.0).astype(np.int32),
    np.arange(300),
    np.random.default_rng(0).normal(size=(9, 9)).astype(np.float32),
    np.random.default_rng(0).normal(size=60).astype(np.float16),
    np.array([1.5, -2.0, 0.0, 7.0], np.float32)[np.random.default_rng(0).integers(0, 4, (20, 20))],
]


def test_a_bomb_inside_a_stream_is_not_unpacked():
    huge = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters.from_level(3, format=zstandard.FORMAT_ZSTD1_MAGICLESS)
    ).compress(bytes(1 << 28))
    assert len(huge) < 20_000
    plain = coder.compress(bytes(1 << 24))
    tracemalloc.start()
    for bomb in (huge, plain):
        with pytest.raises(FileError):
            coder.decode(bytes([coder.PLANES]) + bomb, "uint8", (1000,))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
