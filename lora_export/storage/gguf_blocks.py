"""The block types of ggml as numbers, and numbers as blocks on the scales that are there.

Every type is a row of data. Its codes are stored in planes of some bits; a number is a code less a zero point, or an
entry of a table. An element is step * number + offset, in fp32, as llama.cpp and the package gguf compute it. Steps
and offsets are those of a group of elements. `encode` changes codes alone: the nearest on the grid that is there.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.storage.block_copy import Bytes
from lora_export.storage.gguf_file import BY_NAME, BlockType, GgufFile, GgufTensor
from lora_export.storage.gguf_planes import Plane, read_codes, write_codes
from lora_export.storage.gguf_scales import BlockScales, Floats, Half, InPlanes, PowerOfTwo, SixBits
from lora_export.storage.safetensors_file import Entry, TensorFile

RESOLVED = 1 << 20  # times a step: fp32 does not tell all codes apart beside an offset that is larger


@dataclass(frozen=True, eq=False)
class BlockCodec:
    """How the elements of one type are stored."""

    type: BlockType
    planes: Sequence[Plane]  # the lowest bits of a code first
    scales: BlockScales
    numbers: Floats  # of each code: whole numbers
    group: int  # elements

    def decode(self, blocks: Bytes) -> Floats:
        """The elements of (blocks, bytes): (blocks, elements). Those of a damaged file may not be finite."""
        return self._values(self.codes_of(blocks), *self.scales(blocks))

    def encode(self, blocks: Bytes, values: Floats) -> Bytes:
        """Blocks with the steps and offsets of these, and the codes nearest to the finite values (blocks, elements)."""
        return self.with_codes(blocks, self.nearest(blocks, values))

    def with_codes(self, blocks: Bytes, codes: Bytes) -> Bytes:
        """Blocks with the steps and offsets of these, and other codes (blocks, elements)."""
        result = blocks.copy()
        write_codes(self.planes, result, codes)
        return result

    def values_of(self, blocks: Bytes, codes: Bytes) -> Floats:
        """The elements that other codes have on the steps and offsets of these blocks, (blocks, elements)."""
        return self._values(codes, *self.scales(blocks))

    def nearest(self, blocks: Bytes, values: Floats) -> Bytes:
        """The codes nearest to finite values on the steps and offsets of these blocks, all (blocks, elements).

        Elements that did not change keep their codes, and so do those of a group whose step is zero.
        """
        steps, offsets = self.scales(blocks)
        codes, is_fixed = self.nearest_on(steps, offsets, values), steps == 0
        is_odd = is_fixed if offsets is None else is_fixed | (np.abs(offsets) > RESOLVED * np.abs(steps))
        odd = np.flatnonzero(is_odd.any(axis=1)) if self.is_ladder else np.arange(len(blocks))
        if odd.size:
            stored, own = self.codes_of(blocks[odd]), None if offsets is None else offsets[odd]
            codes[odd] = self._nearer(codes[odd], stored, values[odd], steps[odd], own)
        return codes

    def nearest_on(self, steps: Floats, offsets: Floats | None, values: Floats) -> Bytes:
        """The codes nearest to (blocks, elements) on any steps and offsets, (blocks, groups)."""
        wanted = values.reshape(len(values), -1, self.group)
        divisor: Floats = np.where(steps == 0, np.float32(np.inf), steps).astype(np.float32)[..., None]
        with np.errstate(over="ignore"):
            position = wanted / divisor if offsets is None else wanted - offsets[..., None]
            if offsets is not None:
                position /= divisor
            return self._nearest(position).reshape(len(values), -1)

    def beyond(self, blocks: Bytes, values: Floats, nearest: Bytes) -> Bytes:
        """The codes of the elements on the other side of the values than the nearest; these, where there is none.

        A code whose element the block has already is the block's own. All are (blocks, elements).
        """
        steps, offsets = self.scales(blocks)
        stored, size = self.codes_of(blocks), (len(blocks), -1)
        near = self._values(nearest, steps, offsets)
        is_above = ((values > near).reshape(*size, self.group) == (steps > 0)[..., None]).reshape(size)
        found: Bytes = np.where(is_above, self._next[1].take(nearest), self._next[0].take(nearest))
        found = np.where(values == near, nearest, found)
        return np.where(self._values(found, steps, offsets) == self._values(stored, steps, offsets), stored, found)

    @functools.cached_property
    def _next(self) -> tuple[Bytes, Bytes]:
        """For each code that of the next smaller number, and that of the next larger one; at an end, its own."""
        ordered, codes = np.unique(self.numbers, return_index=True)
        places = np.searchsorted(ordered, self.numbers)
        below, above = (codes[np.clip(places + step, 0, len(codes) - 1)].astype(np.uint8) for step in (-1, 1))
        return below, above

    def decode_finite(self, blocks: Bytes) -> tuple[Floats, int]:
        """The elements, and the number of blocks that have others than finite ones. See `decode`."""
        steps, offsets = self.scales(blocks)
        bad = len(blocks) - int(np.isfinite(self.largest(steps, offsets)).sum())
        return self._values(self.codes_of(blocks), steps, offsets), bad

    def largest(self, steps: Floats, offsets: Floats | None) -> Floats:
        """The largest absolute value that each block can have, (blocks,); not finite in a damaged block."""
        with np.errstate(over="ignore", invalid="ignore"):
            reach = np.abs(steps) * np.abs(self.numbers).max()
            reach = reach if offsets is None else reach + np.abs(offsets)
        largest: Floats = reach.max(axis=1)
        return largest

    def codes_of(self, blocks: Bytes) -> Bytes:
        """The code of each element, (blocks, elements)."""
        return read_codes(self.planes, blocks)

    @functools.cached_property
    def is_ladder(self) -> bool:
        """Whether the number of a code is the code less a zero point."""
        return bool((np.diff(self.numbers) == 1).all())

    def _values(self, codes: Bytes, steps: Floats, offsets: Floats | None) -> Floats:
        if self.is_ladder:  # several times as fast as a look-up
            values = codes.astype(np.float32)
            if self.numbers[0]:
                values += self.numbers[0]
        else:
            values = self.numbers.take(codes)
        grouped = values.reshape(len(codes), -1, self.group)
        grouped *= steps[..., None]
        if offsets is not None:
            grouped += offsets[..., None]
        return values

    def _nearest(self, position: Floats) -> Bytes:
        """The codes of the numbers nearest to these positions, which are overwritten."""
        if self.is_ladder:
            np.rint(position, out=position)  # first: in a sum with the zero point, fractions lose bits
            position -= self.numbers[0]
            codes: Bytes = np.clip(position, 0, len(self.numbers) - 1, out=position).astype(np.uint8)
            return codes
        # The middle of two whole numbers is a multiple of a half: the positions between two of these have one code.
        first = 2 * self.numbers.min()
        position *= 2
        np.floor(position, out=position)
        position -= first
        return self._by_half.take(np.clip(position, 0, len(self._by_half) - 1, out=position).astype(np.uint16))

    @functools.cached_property
    def _by_half(self) -> Bytes:
        """The code of the number nearest to each quarter that is not whole, from the least number to the largest."""
        quarters = np.arange(self.numbers.min(), self.numbers.max() + 0.5, 0.5) + 0.25
        codes: Bytes = np.abs(quarters[:, None] - self.numbers).argmin(axis=1).astype(np.uint8)
        return codes

    def _nearer(self, codes: Bytes, stored: Bytes, values: Floats, steps: Floats, offsets: Floats | None) -> Bytes:
        """Of each code and the stored one that which is nearer; the stored one where both are as near."""
        with np.errstate(over="ignore", invalid="ignore"):
            distance = np.abs(self._values(codes, steps, offsets) - values)
            return np.where(distance < np.abs(self._values(stored, steps, offsets) - values), codes, stored)


# --- The types ---


def _ladder(count: int, zero: int = 0) -> Floats:
    return np.arange(count, dtype=np.float32) - zero


_FLOAT4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
_NON_LINEAR = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def _codec(
    name: str, scales: BlockScales, numbers: Floats, *planes: tuple[int, int, int, int], groups: int = 1
) -> BlockCodec:
    kind = BY_NAME[name]
    return BlockCodec(kind, [Plane(*plane) for plane in planes], scales, numbers, kind.elements // groups)


def _in_groups(
    step: int, *planes: tuple[int, int, int, int], zero: int = 0, codes: int, offset: Half | None = None
) -> BlockScales:
    return BlockScales(Half(step), offset, InPlanes([Plane(*plane) for plane in planes]), zero, codes)


_STEP, _STEP_AND_OFFSET = BlockScales(Half(0)), BlockScales(Half(0), Half(2))
_SIX_BITS = BlockScales(Half(0), Half(2, sign=-1), SixBits(4), codes=64)

# Type -> its codec; planes are (start, chunks, width, bits)
CODECS = {
    codec.type: codec
    for codec in (
        _codec("Q8_0", _STEP, _ladder(256, 128), (2, 1, 32, 8)),
        _codec("Q4_0", _STEP, _ladder(16, 8), (2, 1, 16, 4)),
        _codec("Q4_1", _STEP_AND_OFFSET, _ladder(16), (4, 1, 16, 4)),
        _codec("Q5_0", _STEP, _ladder(32, 16), (6, 1, 16, 4), (2, 4, 1, 1)),
        _codec("Q5_1", _STEP_AND_OFFSET, _ladder(32), (8, 1, 16, 4), (4, 4, 1, 1)),
        _codec(
            *("Q2_K", _in_groups(80, (0, 1, 16, 4), codes=16, offset=Half(82, sign=-1)), _ladder(4), (16, 2, 32, 2)),
            groups=16,
        ),
        _codec(
            *("Q3_K", _in_groups(108, (96, 1, 8, 4), (104, 1, 4, 2), zero=32, codes=64), _ladder(8, 4)),
            *((32, 2, 32, 2), (0, 1, 32, 1)),
            groups=16,
        ),
        _codec("Q4_K", _SIX_BITS, _ladder(16), (16, 4, 32, 4), groups=8),
        _codec("Q5_K", _SIX_BITS, _ladder(32), (48, 4, 32, 4), (16, 1, 32, 1), groups=8),
        _codec(
            *("Q6_K", _in_groups(208, (192, 1, 16, 8), zero=128, codes=256), _ladder(64, 32)),
            *((0, 2, 64, 4), (128, 2, 32, 2)),
            groups=16,
        ),
        _codec("MXFP4", BlockScales(PowerOfTwo(0)), _FLOAT4, (1, 1, 16, 4)),
        _codec("IQ4_NL", _STEP, _NON_LINEAR, (2, 1, 16, 4)),
        _codec(
            *("IQ4_XS", _in_groups(0, (4, 4, 1, 4), (2, 2, 1, 2), zero=32, codes=64), _NON_LINEAR, (8, 8, 16, 4)),
            groups=8,
        ),
    )
}


# Types whose elements NumPy has
FLAT = {
    BY_NAME[name]: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "I8": np.int8,
        "I16": np.int16,
        "I32": np.int32,
        "I64": np.int64,
    }.items()
}


def codec_of(name: str, kind: BlockType) -> BlockCodec:
    """The codec of a tensor's blocks. Raises InputRefused for a type that has none."""
    if kind not in CODECS:
        known = ", ".join(sorted(one.name for one in (*FLAT, *CODECS)))
        raise InputRefused(f"{name} is stored as {kind.name}, which is not supported; supported: {known}")
    return CODECS[kind]


def decoded(name: str, codec: BlockCodec, blocks: Bytes) -> Floats:
    """The elements of (blocks, bytes): (blocks, elements). Raises InputRefused where some are no finite numbers."""
    elements, bad = codec.decode_finite(blocks)
    if bad:
        raise InputRefused(f"{name}: {bad} blocks have scales that are no finite numbers. The file is damaged")
    return elements


@dataclass(frozen=True)
class DecodedTensors(TensorFile):
    """The tensors of a GGUF file. One in blocks is an entry of bytes; `read` makes floats of it."""

    tensors: Mapping[str, GgufTensor]

    def read(self, name: str) -> NDArray[Any]:
        """Read one tensor. Raises InputRefused where the file became shorter, and as `decoded` does."""
        tensor, data = self.tensors[name], super().read(name)
        if tensor.type in FLAT:
            return data
        blocks = data.reshape(-1, tensor.type.nbytes)
        return decoded(name, codec_of(name, tensor.type), blocks).reshape(tensor.shape)


def as_tensor_file(
    file: GgufFile, tensors: Mapping[str, GgufTensor], metadata: Mapping[str, str] = MappingProxyType({})
) -> DecodedTensors:
    """A GGUF file as a file of tensors under these names."""

    def entry(name: str, tensor: GgufTensor) -> Entry:
        dtype = FLAT.get(tensor.type, np.dtype(np.uint8))
        shape = tensor.shape if tensor.type in FLAT else (tensor.stop - tensor.start,)
        return Entry(name, dtype, shape, tensor.start, tensor.stop)

    entries = {name: entry(name, tensor) for name, tensor in tensors.items()}
    return DecodedTensors(file.path, entries, metadata, file.size, file.mtime_ns, tensors)


def new_q8_0(values: Floats) -> Bytes:
    """Blocks of Q8_0 with steps of their own, (blocks, 34), for values (blocks, 32).

    A step is a 127th of the largest value, as ggml chooses it, rounded to fp16. One that fp16 cannot hold is infinite.
    """
    blocks = np.zeros((len(values), BY_NAME["Q8_0"].nbytes), np.uint8)
    with np.errstate(over="ignore"):
        steps = (np.abs(values).max(axis=1, keepdims=True) / np.float32(127)).astype(np.float16)
    blocks[:, :2] = steps.view(np.uint8)
    return CODECS[BY_NAME["Q8_0"]].encode(blocks, values)
