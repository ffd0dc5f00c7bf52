"""A tensor in its file, or a part of one, read in pieces."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.plan.stored_region import StoredRegion
from lora_export.storage import block_copy
from lora_export.storage.file_pieces import PiecesAhead, read_piece
from lora_export.storage.safetensors_file import Entry, TensorFile
from lora_export.verification.against_checkpoint.in_step import AuditInStep
from lora_export.weights.quantised.stored_parts import QuantisedTensor


class Scratch:
    """Named arrays of any content, for one thread. An array is valid until its name is requested again.

    `pieces` reads tensors of which each piece is read after the one before.
    """

    def __init__(self, *, reads_on: bool = True) -> None:
        self._bytes: dict[str, NDArray[np.uint8]] = {}
        self.pieces = PiecesAhead() if reads_on else None

    def array(self, name: str, shape: Sequence[int], dtype: Any = np.float64) -> NDArray[Any]:
        """An array of this shape and dtype, in the memory that is kept under this name."""
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        held = self._bytes.get(name)
        if held is None or held.size < size:
            held = self._bytes[name] = np.empty(size, np.uint8)
        found: NDArray[Any] = held[:size].view(kind).reshape(shape)
        return found


def have_equal_bytes(one: Path, first: int, other: Path, second: int, size: int) -> bool:
    """Whether so many bytes of two files are equal, from these positions on."""
    pieces = PiecesAhead()
    for start in range(0, size, block_copy.BLOCK):
        found = np.empty((2, min(block_copy.BLOCK, size - start)), np.uint8)
        pieces.read(one, found[0], first + start, first + size)
        pieces.read(other, found[1], second + start, second + size)
        if not np.array_equal(*found):
            return False
    return True


PIECE_BYTES = 1 << 22  # of a tensor in fp64 that is compared at once


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in its file; with `region`, the rows and columns of it that are the weight of a module."""

    file: TensorFile
    entry: Entry
    region: StoredRegion | None = None
    quantised: QuantisedTensor | None = None  # `entry` has its packed bytes, its shape and float dtype
    in_step: AuditInStep[Any] | None = None  # reads it, where other audits may need the same bytes

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape if self.region is None else self.region.cut_shape

    def rows(self, rows: slice, scratch: Scratch | None = None, name: str = "") -> NDArray[Any]:
        """Some rows, as they are stored; a scalar is one row. Raises InputRefused where the file became shorter.

        They may be in the memory that `scratch` keeps under this name, and are valid until it is used again.
        """
        if self.region is None:
            return self._read(rows, self.entry.shape, self.entry.rows or 1, scratch, name)
        first, last = self.region.rows.start, self.region.rows.stop
        own = slice(first + rows.start, first + rows.stop)
        return self._read(own, self.region.shape, last, scratch, name)[:, *self._columns()]

    def _columns(self) -> tuple[slice, ...]:
        assert self.region is not None
        return () if len(self.region.shape) == 1 else (self.region.columns,)

    def _read(self, rows: slice, shape: Sequence[int], last: int, scratch: Scratch | None, name: str) -> NDArray[Any]:
        """Some rows of the whole tensor, which has this shape. Up to the row `last` the others are read next."""
        if self.quantised is not None:
            own = self.quantised.rows_in(shape or (1,), rows)
            with self.file.path.open("rb") as file:
                packed = self.quantised.read(self.file.path, file.fileno(), self.entry.start, self.entry.nbytes, own)
            return packed.reshape(rows.stop - rows.start, *shape[1:])
        row_bytes = math.prod(shape[1:]) * self.dtype.itemsize
        scratch = scratch or Scratch(reads_on=False)
        found = scratch.array(name, [(rows.stop - rows.start) * row_bytes], np.uint8)
        position = self.entry.start + rows.start * row_bytes
        until = position + len(found) if scratch.pieces is None else self.entry.start + last * row_bytes
        if self.in_step is not None:
            self.in_step.read(self.file.path, found, position, until)
        elif scratch.pieces is not None:
            scratch.pieces.read(self.file.path, found, position, until)
        else:
            read_piece(self.file.path, found, position)
        return found.view(self.dtype).reshape(rows.stop - rows.start, *shape[1:])

    @property
    def as_matrix(self) -> StoredTensor:
        """The same entries as rows of a matrix: one of many experts is too large a piece."""
        if self.region is not None or len(self.entry.shape) < 3:
            return self
        shape = (math.prod(self.entry.shape[:-1]), self.entry.shape[-1])
        return replace(self, entry=replace(self.entry, shape=shape))

    @property
    def rows_at_once(self) -> int:
        """So many rows cost little more to read than one."""
        if self.quantised is None or self.region is not None or not self.entry.rows:
            return 1
        return max(1, self.quantised.rows_at_once * self.entry.rows // self.quantised.row_shape[0])

    def pieces(self, *, least: int = 1) -> Iterator[slice]:
        """The rows, in pieces of PIECE_BYTES, or of `least` rows where these are more."""
        return pieces_of(self.shape, least=least)

    def part(self, region: StoredRegion) -> StoredTensor:
        return replace(self, region=region)


def pieces_of(shape: Sequence[int], *, least: int = 1) -> Iterator[slice]:
    """The rows of a tensor, in pieces of PIECE_BYTES in fp64, or of `least` rows where these are more."""
    rows = shape[0] if shape else 1
    row_bytes = max(np.dtype(np.float64).itemsize * math.prod(shape[1:]), 1)
    count = max(least, PIECE_BYTES // row_bytes)
    for first in range(0, rows, count):
        yield slice(first, min(first + count, rows))
