"""The order of the symbols: all of them, each once, in batches that fit."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multum.pack import places


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 10_000))
def test_every_place_of_a_matrix_is_visited_once(rows, columns, known):
    seen = np.zeros((rows, columns), int)
    for part, column in places.blocks(rows, columns, known):
        assert column.shape[1] == part.stop - part.start
        np.add.at(seen, (np.arange(part.start, part.stop), column), 1)
    assert (seen == 1).all()


@pytest.mark.parametrize("size", [(1, 3_000_000), (3_000_000, 1), (900_000, 3), (3, 900_000), (1500, 1500)])
def test_batches_of_a_large_matrix_are_bounded(size):
    sizes = [column.size for _, column in places.blocks(*size, 0)]
    assert sum(sizes) == math.prod(size)
    assert max(sizes) <= places.BATCH
    assert len(sizes) < 100 + 2 * sum(sizes) // places.BATCH + 40


def test_every_row_is_known_early():
    """After a part of the symbols each row was visited as often as the others."""
    seen = np.zeros(2000, int)
    for part, column in places.blocks(2000, 1000, 0):
        if seen.sum() > 1 << 18:
            break
        seen[part] += len(column)
    assert seen.min() > 100


def test_kernels_go_from_the_middle_outwards_and_name_near_neighbours():
    order = places.order((3, 3))
    assert [tap for tap, _ in order] == [4, 1, 3, 5, 7, 0, 2, 6, 8]
    assert order[0][1] == []
    assert dict(order[5][1]) == {1: 1.0, 3: 1.0, 4: 1 / 8, 5: 1 / 125}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((8, 4, 3, 3), (8, 4, (3, 3))),
        ((7,), (1, 7, ())),
        ((), (1, 1, ())),
        ((5, 6), (5, 6, ())),
        ((1, 197, 768), (197, 768, ())),
    ],
)
def test_shapes_are_seen_as_channels_and_kernels(shape, expected):
    assert places.grid(shape) == expected
