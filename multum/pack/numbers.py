"""Numbers in few bytes: single ones for heads, and bits that no model can make smaller."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def pack_numbers(*numbers: int) -> bytes:
    """Integers, small ones in a byte: seven bits at a time, the lowest first, the sign in front of them."""
    packed = bytearray()
    for number in numbers:
        rest = 2 * number if number >= 0 else -2 * number - 1
        while rest > 127:
            packed.append(rest & 127 | 128)
            rest >>= 7
        packed.append(rest)
    return bytes(packed)


def unpack_numbers(data: memoryview, count: int) -> tuple[list[int], memoryview]:
    """``count`` integers, and the data behind them. Raises ``ValueError`` when one is longer than 63 bits."""
    numbers, place = [], 0
    for _ in range(count):
        number = shift = 0
        while (byte := data[place]) > 127 and shift < 56:
            number, shift, place = number | (byte & 127) << shift, shift + 7, place + 1
        if byte > 127:
            raise ValueError("a number is too long")
        number, place = number | byte << shift, place + 1
        numbers.append(-(number >> 1) - 1 if number & 1 else number >> 1)
    return numbers, data[place:]


def mean_code(mean: float) -> int:
    """A magnitude in one byte, in quarter octaves from 1/64 up."""
    return int(np.clip((np.float64(max(mean, 2.0**-6)).view(np.int64) >> 50) - (1017 << 2), 0, 255))


def mean_of(code: int) -> float:
    return math.ldexp(1 + code % 4 / 4, code // 4 - 6)


def pack_bits(values: NDArray[np.uint64], bits: int) -> bytes:
    """Unsigned values of ``bits`` bits, up to 64: the lowest byte of all, then the next, then what is left, without gaps."""
    whole, above = divmod(bits, 8)
    packed = [(values >> np.uint64(8 * plane)).astype(np.uint8).tobytes() for plane in range(whole)]
    if above:
        groups = np.zeros((-(-values.size // 8), 8), np.uint64)
        groups.reshape(-1)[: values.size] = values >> np.uint64(8 * whole)
        joined = np.zeros(len(groups), "<u8")
        for place in range(8):
            joined |= groups[:, place] << np.uint64(place * above)
        packed.append(joined.view(np.uint8).reshape(-1, 8)[:, :above].tobytes()[: -(-values.size * above // 8)])
    return b"".join(packed)


def unpack_bits(data: memoryview, count: int, bits: int) -> tuple[NDArray[np.uint64], memoryview]:
    """What ``pack_bits`` packed, and the data behind it. Raises ``ValueError`` when there is not as much."""
    whole, above = divmod(bits, 8)
    values = np.zeros(count, np.uint64)
    for plane in range(whole):
        values |= np.frombuffer(data, np.uint8, count, plane * count).astype(np.uint64) << np.uint64(8 * plane)
    size = -(-count * above // 8)
    if above:
        groups = np.zeros((-(-count // 8), 8), np.uint8)
        found = np.frombuffer(data, np.uint8, size, whole * count)
        padded = np.zeros(len(groups) * above, np.uint8)
        padded[:size] = found
        groups[:, :above] = padded.reshape(-1, above)
        joined = groups.view("<u8")
        shifts = np.arange(8, dtype=np.uint64) * np.uint64(above)
        each = (joined >> shifts & np.uint64((1 << above) - 1)).reshape(-1)[:count]
        values |= each << np.uint64(8 * whole)
    if whole * count + size > len(data):
        raise ValueError("bits are missing")
    return values, data[whole * count + size :]
