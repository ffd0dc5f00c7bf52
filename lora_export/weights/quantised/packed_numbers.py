"""Numbers of a few bits, packed into bytes and words, and the tables of their values.

The 4-bit floats (E2M1) are two in a byte, the first in the low half: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and their negatives.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lora_export.storage.block_copy import Bytes

FINE_BITS = 8  # of numbers that get more bits

POSITIVE_FLOAT4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
FLOAT4_VALUES = np.concatenate([POSITIVE_FLOAT4, -POSITIVE_FLOAT4])
WORD, WORD_BYTES = 32, 4  # bits, bytes
MOST_BITS = 8


def pairs_of_bytes(table: NDArray[np.float32], shifts: tuple[int, int] = (0, 4)) -> NDArray[np.complex64]:
    """The two values of each byte, whose bits begin there, as one element: one look-up for both."""
    both = np.arange(256)
    return np.stack([table[both >> shift & 0xF] for shift in shifts], axis=1).view(np.complex64).reshape(-1)


FLOAT4_PAIRS = pairs_of_bytes(FLOAT4_VALUES)


def unpack_floats(packed: Bytes) -> NDArray[np.float32]:
    """The floats in some bytes, two for each."""
    return FLOAT4_PAIRS.take(packed).view(np.float32)


# --- Integers: a number begins where the one before it ends, from the lowest bit on ---


def unpack(words: NDArray[np.uint32] | NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """The first `count` numbers of `bits` bits in each row of words: (rows, words) -> (rows, count).

    A number may begin in one word and end in the next, as 10 numbers of 3 bits leave 2 bits of a word.
    """
    rows = len(words)
    if bits == 8:
        return words.view(np.uint8).reshape(rows, -1)[:, :count]
    if bits == 4:
        octets = words.view(np.uint8).reshape(rows, -1)
        numbers = np.empty((rows, 2 * octets.shape[1]), np.uint8)
        np.bitwise_and(octets, 0xF, out=numbers[:, 0::2])
        np.right_shift(octets, 4, out=numbers[:, 1::2])
        return numbers[:, :count]
    starts = np.arange(count) * bits
    first, shifts = starts // WORD, (starts % WORD).astype(np.uint32)
    mask = np.uint32((1 << bits) - 1)
    numbers = ((words[:, first] >> shifts) & mask).astype(np.uint8)
    split = np.flatnonzero(starts % WORD + bits > WORD)
    rest = (words[:, first[split] + 1] << (WORD - shifts[split])) & mask
    numbers[:, split] |= rest.astype(np.uint8)
    return numbers


def words_of(count: int, bits: int) -> int:
    """How many words hold so many numbers."""
    return -(-count * bits // WORD)


def pack(numbers: NDArray[np.uint8], bits: int, packed: NDArray[np.uint8]) -> None:
    """Write numbers of `bits` bits into the rows of packed bytes, from the lowest bit on. Bits behind them stay.

    The inverse of `unpack`.
    """
    rows, count = numbers.shape
    each = 8 // bits if 8 % bits == 0 else 0
    if each and count % each == 0:
        parts = numbers.reshape(rows, count // each, each)
        joined = parts[:, :, 0].copy()
        for place in range(1, each):
            joined |= parts[:, :, place] << np.uint8(place * bits)
        packed[:, : count // each] = joined
        return
    stream = np.unpackbits(packed, axis=1, bitorder="little")
    own = np.unpackbits(np.ascontiguousarray(numbers)[:, :, None], axis=2, bitorder="little")[:, :, :bits]
    stream[:, : count * bits] = own.reshape(rows, -1)
    packed[:] = np.packbits(stream, axis=1, bitorder="little")
