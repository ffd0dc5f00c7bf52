"""The scales of ggml's blocks: the numbers that steps and offsets are made of, read and written.

A step is a number of the block, in the larger blocks times a whole number of its group. So is an offset. Products are
in fp32, as llama.cpp and the package gguf compute them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lora_export.storage.block_copy import Bytes
from lora_export.storage.gguf_planes import Plane, read_codes, write_codes

Floats = NDArray[np.float32]
# Steps and offsets of each group: (blocks, groups) in fp32, or no offsets
StepsAndOffsets = tuple[Floats, Floats | None]


class ScaleNumbers(NamedTuple):
    """What blocks store of their steps and offsets: (blocks, 1) of the blocks, (blocks, groups) of the groups."""

    step: Floats
    offset: Floats | None = None
    steps: Floats | None = None  # whole numbers
    offsets: Floats | None = None

    def products(self) -> StepsAndOffsets:
        with np.errstate(over="ignore", invalid="ignore"):
            steps = self.step if self.steps is None else self.step * self.steps
            if self.offset is None or self.offsets is None:
                return steps, self.offset
            return steps, self.offset * self.offsets


class BlockNumber(Protocol):
    """A number of each block."""

    def read(self, blocks: Bytes) -> Floats: ...

    def stored(self, values: NDArray[np.floating]) -> Floats:
        """The nearest numbers that can be stored; infinite beyond the largest."""

    def write(self, blocks: Bytes, numbers: Floats) -> None: ...


@dataclass(frozen=True)
class Half:
    """A number in fp16, `sign` times what is stored."""

    start: int
    sign: int = 1

    def read(self, blocks: Bytes) -> Floats:
        found = np.ascontiguousarray(blocks[:, self.start : self.start + 2]).view(np.float16).astype(np.float32)
        return found if self.sign > 0 else -found

    def stored(self, values: NDArray[np.floating]) -> Floats:
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)

    def write(self, blocks: Bytes, numbers: Floats) -> None:
        halves = (self.sign * numbers).astype(np.float16)
        blocks[:, self.start : self.start + 2] = halves.view(np.uint8).reshape(len(blocks), 2)


@dataclass(frozen=True)
class PowerOfTwo:
    """2^(byte - 128): half of the format's power, because the numbers of its table are twice as large."""

    start: int

    def read(self, blocks: Bytes) -> Floats:
        return np.ldexp(np.float32(1), blocks[:, self.start : self.start + 1].astype(np.int32) - 128)

    def stored(self, values: NDArray[np.floating]) -> Floats:
        mantissas, exponents = np.frexp(values)
        nearest = np.where(mantissas > 0, exponents - (mantissas <= 0.75), -128)
        found: Floats = np.ldexp(np.float32(1), np.clip(nearest, -128, 126))
        return found

    def write(self, blocks: Bytes, numbers: Floats) -> None:
        blocks[:, self.start : self.start + 1] = np.frexp(numbers)[1] + 127


class GroupNumbers(Protocol):
    """Whole numbers of the groups of a block: those of the steps, then those of the offsets."""

    def read(self, blocks: Bytes) -> Bytes: ...

    def write(self, blocks: Bytes, codes: Bytes) -> None: ...


@dataclass(frozen=True)
class InPlanes:
    planes: Sequence[Plane]

    def read(self, blocks: Bytes) -> Bytes:
        return read_codes(self.planes, blocks)

    def write(self, blocks: Bytes, codes: Bytes) -> None:
        write_codes(self.planes, blocks, codes)


@dataclass(frozen=True)
class SixBits:
    """Eight and eight numbers of 6 bits in 12 bytes: the last four of each have their highest bits apart."""

    start: int

    def read(self, blocks: Bytes) -> Bytes:
        own = blocks[:, self.start : self.start + 8]
        rest = Plane(self.start + 8, 1, 4, 4).read(blocks)  # the low bits of the last four of each
        first, last = own & 0x3F, rest | own >> 2 & 0x30
        return np.concatenate([first.reshape(-1, 2, 4), last.reshape(-1, 2, 4)], axis=2).reshape(len(blocks), 16)

    def write(self, blocks: Bytes, codes: Bytes) -> None:
        halves = codes.reshape(-1, 2, 8)
        first, last = (halves[:, :, own].reshape(len(blocks), 8) for own in (slice(4), slice(4, 8)))
        blocks[:, self.start : self.start + 8] = first | (last & 0x30) << 2
        Plane(self.start + 8, 1, 4, 4).write(blocks, last)


@dataclass(frozen=True, eq=False)
class BlockScales:
    """How a type stores its steps and offsets."""

    step: BlockNumber
    offset: BlockNumber | None = None
    groups: GroupNumbers | None = None
    zero: int = 0  # what a code of a group's number is less
    codes: int = 1  # of such a number

    @property
    def least(self) -> int:
        """The least whole number of a group."""
        return -self.zero

    @property
    def largest(self) -> int:
        """The largest whole number of a group."""
        return self.codes - 1 - self.zero

    def __call__(self, blocks: Bytes) -> StepsAndOffsets:
        return self.numbers(blocks).products()

    def numbers(self, blocks: Bytes) -> ScaleNumbers:
        """What (blocks, bytes) store. Numbers of a damaged file may not be finite."""
        step, offset = self.step.read(blocks), None if self.offset is None else self.offset.read(blocks)
        if self.groups is None:
            return ScaleNumbers(step, offset)
        codes = self.groups.read(blocks).astype(np.float32)
        if self.zero:
            codes -= np.float32(self.zero)
        if offset is None:
            return ScaleNumbers(step, None, codes)
        count = codes.shape[1] // 2
        return ScaleNumbers(step, offset, codes[:, :count], codes[:, count:])

    def write(self, blocks: Bytes, numbers: ScaleNumbers) -> None:
        """Store numbers that can be stored, in place."""
        self.step.write(blocks, numbers.step)
        if self.offset is not None and numbers.offset is not None:
            self.offset.write(blocks, numbers.offset)
        if self.groups is not None and numbers.steps is not None:
            both = numbers.steps if numbers.offsets is None else np.concatenate([numbers.steps, numbers.offsets], 1)
            self.groups.write(blocks, (both + np.float32(self.zero)).astype(np.uint8))
