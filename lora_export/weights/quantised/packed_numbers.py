"""Numbers of a few bits, packed: 4-bit floats, and small integers in words of 32 bits.

The 4-bit floats (E2M1) are two in a byte, the first in the low half: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and their negatives.

Scales that are powers of two are stored as exponents (E8M0): 2^(byte - 127). The byte 255 is no number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.storage.block_copy import Bytes

POSITIVE_FLOAT4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
FLOAT4_VALUES = np.concatenate([POSITIVE_FLOAT4, -POSITIVE_FLOAT4])
NOT_A_NUMBER = 255
WORD, WORD_BYTES = 32, 4  # bits, bytes
MOST_BITS = 8


def _pairs() -> NDArray[np.complex64]:
    """The two values of each byte, as one element: one look-up for both."""
    both = np.arange(256)
    return np.stack([FLOAT4_VALUES[both & 0xF], FLOAT4_VALUES[both >> 4]], axis=1).view(np.complex64).reshape(-1)


FLOAT4_PAIRS = _pairs()


def unpack_floats(packed: Bytes) -> NDArray[np.float32]:
    """The floats in some bytes, two for each."""
    return FLOAT4_PAIRS.take(packed).view(np.float32)


def powers_of_two(name: str, stored: NDArray[Any]) -> NDArray[np.float32]:
    """2^(byte - 127). Raises InputRefused for the byte that is no number; `name` is the part's, for the message."""
    if (stored == NOT_A_NUMBER).any():
        raise InputRefused(f"{name}: a scale of {NOT_A_NUMBER} is no number. The file is damaged")
    scales: NDArray[np.float32] = np.ldexp(np.float32(1), stored.astype(np.int32) - 127)
    return scales


# --- Integers: a number begins where the one before it ends, from the lowest bit on ---


def unpack(words: NDArray[np.uint32], bits: int, count: int) -> NDArray[np.uint8]:
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
