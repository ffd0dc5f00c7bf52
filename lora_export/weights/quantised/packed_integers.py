"""Small integers in words of 32 bits: a number begins where the one before it ends, from the lowest bit on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WORD, WORD_BYTES = 32, 4  # bits, bytes
MOST_BITS = 8


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
