"""The difference of one tensor between two checkpoints, in blocks of rows.

Memory is one block and a few columns, whatever the size of the tensor. A small difference is kept, and read once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_export.adapters.singular_values import BlockedMatrix, RowBlock
from lora_export.errors import InputRefused
from lora_export.storage import block_copy
from lora_export.storage.safetensors_file import Entry, TensorFile

BLOCK_ENTRIES = 1 << 22  # of a difference in memory at once: 16 MiB in fp32
CACHED_ENTRIES = 1 << 25  # of a difference that is kept: 128 MiB in fp32


class TensorInFile(NamedTuple):
    """One tensor in its file."""

    file: TensorFile
    name: str

    @property
    def entry(self) -> Entry:
        return self.file.entries[self.name]


def have_equal_bits(base: TensorInFile, tuned: TensorInFile) -> bool:
    """Whether two tensors of one shape have the same dtype and the same bits."""
    if base.entry.dtype != tuned.entry.dtype:
        return False
    return all(np.array_equal(_bits(old), _bits(new)) for _, old, new in _stored_rows(base, tuned))


@dataclass(eq=False)
class Difference(BlockedMatrix):
    """`tuned - base` of one tensor, as a matrix (rows, columns) of its first dimension and all others.

    Raises InputRefused where a value of either is not finite.
    """

    base: TensorInFile
    tuned: TensorInFile
    energy: float = field(init=False)  # ‖·‖²
    is_equal: bool = field(init=False)  # whether both have the same bits

    def __post_init__(self) -> None:
        self._kept: list[RowBlock] = []
        self.energy, self.is_equal = 0.0, True
        entry = self.base.entry
        self.shape = (entry.rows, math.prod(entry.shape[1:]))
        for rows, old, new in _stored_rows(self.base, self.tuned):
            if old.dtype == new.dtype and np.array_equal(_bits(old), _bits(new)):
                continue
            self.is_equal = False
            change = self._subtracted(old, new)
            self.energy += float(np.einsum("ij,ij->", change, change, dtype=np.float64))
            if math.prod(self.shape) <= CACHED_ENTRIES and change.any():
                self._kept.append((rows, change))

    def _subtracted(self, old: NDArray[np.generic], new: NDArray[np.generic]) -> NDArray[np.float32]:
        with np.errstate(over="ignore", invalid="ignore"):
            change: NDArray[np.float32] = np.subtract(_wide(new), _wide(old)).astype(np.float32)
        if not np.isfinite(change).all():
            where = "BASE" if not np.isfinite(_wide(old)).all() else "TUNED"
            raise InputRefused(
                f"{self.tuned.name}: {where} holds values that are not finite, or too far apart for float32"
            )
        return change

    def blocks(self) -> Iterator[RowBlock]:
        """The blocks of rows that are not all zero."""
        if self._kept:
            yield from self._kept
            return
        for rows, old, new in _stored_rows(self.base, self.tuned):
            if old.dtype != new.dtype or not np.array_equal(_bits(old), _bits(new)):
                yield rows, self._subtracted(old, new)


_Rows = tuple[slice, NDArray[np.generic], NDArray[np.generic]]


def _stored_rows(base: TensorInFile, tuned: TensorInFile) -> Iterator[_Rows]:
    """Blocks of rows of a tensor in both files, (rows, columns)."""
    entry = base.entry
    step = max(1, BLOCK_ENTRIES // max(1, math.prod(entry.shape[1:])))
    with base.file.path.open("rb") as first, tuned.file.path.open("rb") as second:
        for start in range(0, entry.rows, step):
            rows = slice(start, min(start + step, entry.rows))
            yield rows, _rows(base, first.fileno(), rows), _rows(tuned, second.fileno(), rows)


def _rows(tensor: TensorInFile, fd: int, rows: slice) -> NDArray[np.generic]:
    """Some rows of a tensor, (rows, columns), from its file."""
    entry = tensor.entry
    stored = np.empty((rows.stop - rows.start) * entry.row_bytes, np.uint8)
    block_copy.read(tensor.file.path, fd, stored, entry.start + rows.start * entry.row_bytes)
    return stored.view(entry.dtype).reshape(rows.stop - rows.start, -1)


def _bits(array: NDArray[np.generic]) -> NDArray[np.uint8]:
    return array.view(np.uint8)


def _wide(array: NDArray[np.generic]) -> NDArray[np.floating]:
    """The values in fp32, or in fp64 where they are stored so."""
    return array.astype(np.float64 if array.dtype == np.float64 else np.float32)
