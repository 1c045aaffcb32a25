"""Large tensors are coded in blocks: every symbol comes back, structure is used, and the coder is asked for few, large things."""

import tracemalloc
from contextlib import suppress

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multum.errors import FileError
from multum.pack import bulk, coder, integers
from multum.pack.histograms import Histograms
from multum.pack.numbers import unpack_numbers
from multum.pack.symbols import Decoder, Encoder


def entropy(array: np.ndarray) -> float:
    """Zero-order entropy in bytes."""
    counts = np.unique(array, return_counts=True)[1]
    return float(-(counts * np.log2(counts / array.size)).sum() / 8)


def parameters(coded: bytes) -> list[int]:
    """Of a stream of integers: lowest level, how many more, what codes them."""
    assert coded[0] == coder.INTEGERS
    return unpack_numbers(memoryview(coded)[1:], 3)[0]


@settings(max_examples=40, deadline=None)
@given(hnp.array_shapes(min_dims=1, max_dims=4, max_side=16), st.sampled_from([1, 2, 3, 9, 40, 200]), st.booleans(), st.integers(0, 9))
def test_every_symbol_comes_back(shape, levels, sparse, seed):
    rng = np.random.default_rng(seed)
    low = int(rng.integers(-levels, 1))
    symbols = rng.integers(low, low + levels, shape).reshape(-1)
    split = sparse and low < 0 < low + levels - 1
    if split:
        symbols[rng.random(symbols.size) < 0.8] = 0

    def histograms() -> Histograms:
        return Histograms(np.arange(low, low + levels), 1.0, symbols.size, 2.0 if split else None, bulk=True)

    stream, found = Encoder(), np.full(symbols.size, 99)
    stream.add(symbols, low, shape, histograms())
    Decoder(stream.data()).take(found, low, shape, histograms())
    assert (found == symbols).all()


@pytest.mark.parametrize("scale", [0.3, 2, 40, 3000])
@pytest.mark.parametrize("shape", [(300, 301), (70_000,), (3, 22_000), (40_000, 2), (64, 130, 3, 3)])
def test_large_integers_come_back_and_take_their_entropy(scale, shape):
    array = np.random.default_rng(0).normal(0, scale, shape).round().clip(-30000, 30000).astype(np.int16)
    coded = coder.encode(array)
    assert coder.decode(coded, "int16", shape).tobytes() == array.tobytes()
    assert len(coded) < 1.02 * entropy(array) + 64


@pytest.mark.parametrize("values", [np.float32, np.float16])
def test_large_floats_and_palettes_come_back(values):
    rng = np.random.default_rng(0)
    array = rng.normal(size=(260, 270)).astype(values)
    few = (array * 4).round().astype(values)
    for tensor in (array, few):
        assert coder.decode(coder.encode(tensor), tensor.dtype.name, tensor.shape).tobytes() == tensor.tobytes()
    assert len(coder.encode(few)) < 1.04 * entropy(few)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 5000), (5000, 1), (40, 33), (700, 513), (3, 600_000)])
def test_rectangles_hold_every_place_once(rows, columns):
    seen = np.zeros((rows, columns), int)
    for across, down in bulk._rectangles(rows, columns):
        assert across.size * down.size <= bulk._BATCH
        seen[np.ix_(across, down)] += 1
    assert (seen == 1).all()


def test_rows_and_columns_of_different_size_are_told_apart():
    """With known scales the symbols take the mean entropy of a row by a column, which is far below that of all together."""
    rng = np.random.default_rng(0)
    rows, columns = 4.0 ** rng.choice([-1, 0, 1], 1024)[:, None], 2.0 ** rng.choice([-1, 0, 1], 512)
    array = (rng.normal(size=(1024, 512)) * rows * columns).round().clip(-60, 60).astype(np.int8)
    scale = rows * columns * np.ones_like(array)
    apart = sum(entropy(array[scale == value]) for value in np.unique(scale))
    coded = coder.encode(array)
    assert parameters(coded)[2] // 2 == integers._BULK + 1
    assert apart < 0.8 * entropy(array)
    assert len(coded) < 1.06 * apart


def test_how_many_are_pruned_and_how_large_the_others_are_is_learned_apart():
    """Rows with few large weights and rows with many small ones have the same mean magnitude, and another histogram."""
    rng = np.random.default_rng(1)
    few = rng.random(1024) < 0.5
    kept = rng.random((1024, 512)) < np.where(few, 0.05, 0.4)[:, None]
    magnitude = np.where(few[:, None], rng.integers(5, 8, (1024, 512)), rng.integers(1, 2, (1024, 512)))
    array = (kept * magnitude * rng.choice([-1, 1], (1024, 512))).astype(np.int8)
    coded = coder.encode(array)
    assert parameters(coded)[2] // 2 == integers._BULK + 2
    assert coder.decode(coded, "int8", array.shape).tobytes() == array.tobytes()
    apart = entropy(array[few]) + entropy(array[~few])
    assert apart < 0.9 * entropy(array)
    assert len(coded) < 1.07 * apart


def test_a_kernel_whose_positions_tell_of_each_other_is_not_coded_in_blocks():
    rng = np.random.default_rng(0)
    smooth = np.repeat(rng.integers(-3, 4, (128, 128, 1)), 9, 2) + (rng.random((128, 128, 9)) < 0.05)
    apart = rng.permuted(smooth, axis=None)
    kinds = [parameters(coder.encode(a.reshape(128, 128, 3, 3).astype(np.int8)))[2] // 2 for a in (smooth, apart)]
    assert kinds == [1, integers._BULK + 1]


def test_steps_of_the_logarithm_are_the_nearest():
    """Quarter octaves: 1, 1.25, 1.5, 1.75, 2; between them, the nearer one; at most so many octaves from 1."""
    values = np.array([1.0, 1.12, 1.13, 1.25, 1.7, 2.0, 0.5, 0.9, 1e9, 1e-9])
    assert bulk._octaves(values, 2, 5).tolist() == [0, 0, 1, 1, 3, 4, -4, -1, 20, -20]


def test_symbols_of_few_kinds_are_coded_several_at_once():
    asked = []

    def exchange(symbols, count, model):
        asked.append(count)
        return symbols

    array = np.random.default_rng(0).integers(-1, 2, 1 << 18).astype(np.int8)
    bulk.transfer(array, -1, (512, 512), Histograms(np.arange(-1, 2), 0.7, array.size, bulk=True), exchange, True)
    assert sum(asked) < 1.1 * array.size / 4


LARGE = [
    np.random.default_rng(0).normal(0, scale, shape).round().clip(-100, 100).astype(np.int8)
    for scale, shape in ((0.3, (300, 250)), (30, (300, 250)), (0.6, (64, 130, 3, 3)))
]
CODED = [coder.encode(array) for array in LARGE]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2), st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), max_size=3), st.integers(0, 9000), st.booleans())
def test_forged_streams_fail_cleanly_in_bounded_memory(which, edits, cut, tall):
    data = bytearray(CODED[which])
    for place, value in edits:
        data[place] = value
    shape = (2000, 40) if tall else LARGE[which].shape
    tracemalloc.start()
    with suppress(FileError):
        assert coder.decode(bytes(data[: -cut or None]), "int8", shape).shape == shape
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * LARGE[which].size + (16 << 20)
