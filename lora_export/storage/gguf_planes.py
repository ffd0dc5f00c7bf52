"""Whole numbers of a few bits as the blocks of ggml store them: planes, which have some bits of each number."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lora_export.storage.block_copy import Bytes

SIGN = np.uint8(0x80)


class Plane(NamedTuple):
    """Some bits of each code: bytes from `start` on, in chunks of so many. A chunk has its lowest bits first."""

    start: int
    chunks: int
    width: int
    bits: int

    def read(self, blocks: Bytes) -> Bytes:
        """The bits of all codes, (blocks, elements)."""
        stored = blocks[:, self.start : self.start + self.chunks * self.width]
        if self.bits == 8:  # a signed byte
            return stored ^ SIGN
        stored = stored.reshape(len(blocks), self.chunks, self.width)
        bits = np.empty((len(blocks), self.chunks, len(self._shifts), self.width), np.uint8)
        for place, shift in enumerate(self._shifts):  # a call for each is faster than one with four axes
            np.right_shift(stored, shift, out=bits[:, :, place])
        bits &= self._mask
        return bits.reshape(len(blocks), -1)

    def write(self, blocks: Bytes, codes: Bytes) -> None:
        """Store the lowest bits of all codes, (blocks, elements)."""
        if self.bits == 8:
            codes = codes ^ SIGN
        else:
            bits = (codes & self._mask).reshape(len(blocks), self.chunks, -1, self.width)
            codes = bits[:, :, 0].copy()
            for place, shift in enumerate(self._shifts[1:], 1):
                codes |= bits[:, :, place] << shift
        blocks[:, self.start : self.start + self.chunks * self.width] = codes.reshape(len(blocks), -1)

    @property
    def _mask(self) -> np.uint8:
        return np.uint8((1 << self.bits) - 1)

    @property
    def _shifts(self) -> Bytes:
        return np.arange(0, 8, self.bits, dtype=np.uint8)


def read_codes(planes: Sequence[Plane], blocks: Bytes) -> Bytes:
    """Each code, (blocks, elements). The first plane has the lowest bits."""
    codes, shift = planes[0].read(blocks), 0
    for lower, plane in itertools.pairwise(planes):
        shift += lower.bits
        codes = codes | plane.read(blocks) << np.uint8(shift)
    return codes


def write_codes(planes: Sequence[Plane], blocks: Bytes, codes: Bytes) -> None:
    """Store all codes, (blocks, elements)."""
    shift = 0
    for plane in planes:
        plane.write(blocks, codes >> np.uint8(shift) if shift else codes)
        shift += plane.bits
