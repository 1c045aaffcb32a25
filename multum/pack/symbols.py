"""Entropy coding of symbols 0..K-1 with counts that both sides learn as they go."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


def _blocks(count: int) -> Iterator[slice]:
    start, size = 0, 32
    while start < count:
        yield slice(start, min(count, start + size))
        start += size
        size = max(size, start // 4)


def encode(symbols: NDArray[np.int32], alphabet: int) -> bytes:
    import constriction

    counts, coder = np.full(alphabet, 0.5), constriction.stream.queue.RangeEncoder()
    for block in _blocks(symbols.size):
        coder.encode(symbols[block], constriction.stream.model.Categorical(counts, perfect=False))
        counts += np.bincount(symbols[block], minlength=alphabet)
    return bytes(coder.get_compressed().astype("<u4").tobytes())


def decode(data: bytes | memoryview, count: int, alphabet: int) -> NDArray[np.int32]:
    import constriction

    counts, coder = np.full(alphabet, 0.5), constriction.stream.queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))
    out = np.empty(count, np.int32)
    for block in _blocks(count):
        out[block] = coder.decode(constriction.stream.model.Categorical(counts, perfect=False), block.stop - block.start)
        counts += np.bincount(out[block], minlength=alphabet)
    return out
