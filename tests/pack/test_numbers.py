"""Numbers in few bytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multum.pack.numbers import pack_bits, pack_numbers, unpack_bits, unpack_numbers


@given(st.lists(st.integers(-(2**62), 2**62 - 1), max_size=6), st.binary(max_size=3))
def test_numbers_come_back(numbers, behind):
    found, rest = unpack_numbers(memoryview(pack_numbers(*numbers) + behind), len(numbers))
    assert (found, bytes(rest)) == (numbers, behind)


@given(st.integers(0, 64), st.integers(0, 70), st.binary(max_size=3), st.randoms(use_true_random=False))
def test_bits_come_back_in_as_few_bytes_as_hold_them(bits, count, behind, random):
    values = np.array([random.getrandbits(bits) for _ in range(count)], np.uint64)
    packed = pack_bits(values, bits)
    assert len(packed) == bits // 8 * count + -(-(bits % 8) * count // 8)
    found, rest = unpack_bits(memoryview(packed + behind), count, bits)
    assert (found.tolist(), bytes(rest)) == (values.tolist(), behind)


@pytest.mark.parametrize("bits", [3, 8, 13])
def test_missing_bits_are_noticed(bits):
    packed = pack_bits(np.arange(8, dtype=np.uint64), bits)
    with pytest.raises(ValueError, match=r"buffer|missing"):
        unpack_bits(memoryview(packed[:-1]), 8, bits)
