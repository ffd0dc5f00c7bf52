"""The tensors that a quantised weight is stored in: the packed numbers, their scales, and what describes them.

Headers decide which weights are quantised, and whether their parts fit. The parts themselves are read when the first
rows of a weight are: memory does not grow with the model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.storage import block_copy
from lora_export.storage.block_copy import Bytes
from lora_export.storage.file_pieces import read_piece
from lora_export.storage.safetensors_file import Entry, TensorFile
from lora_export.weights.quantised.codes import Grid, PackedRows, StoredCodes
from lora_export.weights.quantised.new_grid import NewGrid, ScaleRule, new_parts
from lora_export.weights.quantised.packed_numbers import pairs_of_bytes

# (rows of `row_shape`, their packed bytes) -> these rows of the weight, in its float dtype
Decode = Callable[[slice, Bytes], NDArray[Any]]
DecodeScales = Callable[[NDArray[Any]], NDArray[np.float32]]  # stored scales -> factors of numbers
FLOAT_SCALES = ("float32", "bfloat16", "float16")
NOT_A_NUMBER = 255  # among powers of two, which are stored as exponents (E8M0): 2^(byte - 127)
LOADED_AT_ONCE = block_copy.MOST_THREADS  # weights whose scales are in memory


class Pieces(NamedTuple):
    """Bytes of a stored tensor: `number` pieces of `size` bytes, `step` bytes apart. The first is at `start`."""

    start: int
    size: int
    number: int = 1
    step: int = 0


@dataclass(frozen=True, eq=False)
class QuantisedTensor:
    """A weight that is stored as packed numbers with scales."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]  # a float: what the weight becomes
    packed: str  # the stored tensor with its numbers
    parts: tuple[str, ...]  # all other stored tensors that belong to it
    scheme: str  # such as nf4
    load: Callable[[], Decode]  # reads the scales. Raises InputRefused for parts that do not fit
    # The packed bytes that some rows are decoded from; None: those of one row are stored after those of the other.
    pieces: Callable[[slice], Sequence[Pieces]] | None = None
    rows_at_once: int = 1  # so many rows cost little more than one
    codes: StoredCodes | None = None  # how its numbers are written again; None: not known
    finer: Callable[[], NewGrid | None] = lambda: None  # the same weight in 8 bits. Reads scales; None: it has no such
    scaling: ScaleRule | None = None  # the rule for new scales; None: not known
    matrix: tuple[int, int] | None = None  # the shape whose rows are decoded, where it is another than `row_shape`

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape whose rows are decoded: experts of (rows, columns) are one matrix."""
        return self.matrix or (math.prod(self.shape[:-1]), self.shape[-1])

    @property
    def with_new_scales(self) -> NewGrid:
        """The grid of a weight whose scales are new, as it is stored."""
        assert self.codes is not None and self.scaling is not None
        return NewGrid(self.scheme, self.codes, (), new_parts(self.scaling, self.scaling.read), is_rescaled=True)

    def with_parts(self, *names: str) -> QuantisedTensor:
        """The weight with more stored tensors that belong to it."""
        return replace(self, parts=(*self.parts, *names))

    def entry(self, packed: Entry) -> Entry:
        """The weight as a tensor of the file that has its packed numbers: their bytes, its shape and dtype."""
        return Entry(self.name, self.dtype, self.shape, packed.start, packed.stop)

    def decode(self, rows: slice, packed: Bytes) -> NDArray[Any]:
        """Some rows of `row_shape`, from their packed bytes. Reads the scales where they are not in memory."""
        return _loaded(self)(rows, packed)

    def rows_in(self, shape: Sequence[int], rows: slice) -> slice:
        """Rows of the weight in another shape of the same entries, as rows of `row_shape`."""
        per_row = self.row_shape[0] // shape[0]
        return slice(rows.start * per_row, rows.stop * per_row)

    def read(self, path: Path, fd: int, start: int, nbytes: int, rows: slice) -> NDArray[Any]:
        """Some rows of `row_shape`, from the file that has the packed numbers in `nbytes` bytes from `start` on.

        Raises InputRefused where the file became shorter.
        """
        if self.pieces is None:
            row_bytes = nbytes // self.row_shape[0]
            pieces: Sequence[Pieces] = [Pieces(rows.start * row_bytes, (rows.stop - rows.start) * row_bytes)]
        else:
            pieces = self.pieces(rows)
        packed = np.empty(sum(part.number * part.size for part in pieces), np.uint8)
        filled = 0
        for part in pieces:
            for own in range(part.number):
                piece = packed[filled : filled + part.size]
                block_copy.read(path, fd, piece, start + part.start + own * part.step)
                filled += part.size
        return self.decode(rows, packed)


@functools.lru_cache(LOADED_AT_ONCE)
def _loaded(tensor: QuantisedTensor) -> Decode:
    return tensor.load()


@dataclass(frozen=True, eq=False)
class StoredParts:
    """All stored tensors of a checkpoint. The parts of one weight may be in several files."""

    shards: Mapping[str, TensorFile]

    def names(self) -> Iterator[str]:
        yield from self._shard_of

    @functools.cached_property
    def _shard_of(self) -> Mapping[str, TensorFile]:
        return {name: shard for shard in self.shards.values() for name in shard.entries}

    def modules_with(self, kind: str) -> list[str]:
        """The modules that have a tensor of this name."""
        return [module for module, _, last in (name.rpartition(".") for name in self._shard_of) if last == kind]

    def find(self, name: str) -> Entry | None:
        """The entry of a stored tensor; None where there is none."""
        shard = self._shard_of.get(name)
        return None if shard is None else shard.entries[name]

    def present(self, *names: str) -> tuple[str, ...]:
        """Those of the names that are stored."""
        return tuple(name for name in names if name in self._shard_of)

    def expect(self, name: str, weight: str, *dtypes: str, count: int | None = None, most: int | None = None) -> Entry:
        """The entry of a part of a weight, from its header. `count` is the number of its elements, `most` the largest.

        Without `dtypes`, any is allowed. Raises InputRefused where the part is missing, of another size, or of none of
        these dtypes.
        """
        entry = self.find(name)
        if entry is None and name == weight:
            raise InputRefused(f"{weight} is quantised, and its packed numbers are missing")
        if entry is None:
            raise InputRefused(f"{weight} is quantised, and {name}, which belongs to it, is missing")
        if dtypes and str(entry.dtype) not in dtypes:
            raise InputRefused(f"{name}: its dtype is {entry.dtype}, and {weight} needs {' or '.join(dtypes)}")
        found = entry.nbytes // entry.dtype.itemsize
        if (count is not None and found != count) or (most is not None and found > most):
            raise InputRefused(f"{name}: {found} elements, and {weight} needs {most if count is None else count}")
        return entry

    def read(self, name: str) -> NDArray[Any]:
        """Read a part whose entry fits (see `expect`)."""
        return self._shard_of[name].read(name)

    def read_scales(self, name: str) -> NDArray[Any]:
        """Read scales. Raises InputRefused where one is not a finite number."""
        scales = self.read(name)
        refuse_damaged_scales(name, scales)
        return scales

    def read_rows(self, name: str, rows: slice) -> NDArray[Any]:
        """Read some rows of a part whose entry fits. Raises InputRefused where the file became shorter."""
        shard = self._shard_of[name]
        entry = shard.entries[name]
        found = np.empty((rows.stop - rows.start) * entry.row_bytes, np.uint8)
        read_piece(shard.path, found, entry.start + rows.start * entry.row_bytes)
        return found.view(entry.dtype).reshape(rows.stop - rows.start, *entry.shape[1:])


def refuse_damaged_scales(name: str, scales: NDArray[Any]) -> None:
    """Raise InputRefused where a scale is not a finite number."""
    bad = scales.size - np.count_nonzero(np.isfinite(scales))
    if bad:
        raise InputRefused(f"{name}: {bad} scales are not finite numbers. The file is damaged")


def scaled(
    values: NDArray[np.float32], scales: NDArray[Any], dtype: np.dtype[Any], zero_points: NDArray[Any] | None = None
) -> NDArray[Any]:
    """(number - zero point) * scale in fp32, in place, and rounded once to the dtype.

    `values` are (rows, columns). Scales and zero points are (rows, groups), of groups of as many columns.
    """
    grouped = values.reshape(*scales.shape, -1)
    if zero_points is not None:
        grouped -= zero_points.astype(np.float32)[:, :, None]
    grouped *= scales.astype(np.float32)[:, :, None]
    return values.astype(dtype)


def powers_of_two(name: str, stored: NDArray[Any]) -> NDArray[np.float32]:
    """2^(byte - 127). Raises InputRefused for the byte that is no number; `name` is the part's, for the message."""
    if (stored == NOT_A_NUMBER).any():
        raise InputRefused(f"{name}: a scale of {NOT_A_NUMBER} is no number. The file is damaged")
    scales: NDArray[np.float32] = np.ldexp(np.float32(1), stored.astype(np.int32) - 127)
    return scales


def in_groups(
    parts: StoredParts,
    name: str,
    numbers: Entry,
    scales: Entry,
    columns: int,
    dtype: np.dtype[Any],
    every: tuple[str, ...],
    scheme: str,
    *,
    values: NDArray[np.float32],
    reach: float,
    load_scales: Callable[[], DecodeScales],
    encode: Callable[[NDArray[np.float32]], NDArray[Any]],
) -> QuantisedTensor:
    """A matrix of floats with a scale for each group of its columns: `scales` are (rows, groups).

    `load_scales` reads what all scales have in common. `values`, `reach` and `encode` are those of `StoredCodes` and
    `ScaleRule`, `every` has the names of all parts but the numbers.
    """
    shape, width = (numbers.shape[0], columns), columns // scales.shape[1]

    def read() -> NDArray[Any]:
        return parts.read_scales(scales.name)

    def scales_of_rows() -> Callable[[slice], NDArray[np.float32]]:
        stored, decode = read(), load_scales()
        return lambda rows: decode(stored[rows])

    def grid() -> Grid:
        scales_of = scales_of_rows()
        return lambda rows: (np.repeat(scales_of(rows), width, axis=1), None)

    def decode_scales(stored: NDArray[Any]) -> NDArray[np.float32]:
        return load_scales()(stored)

    def spread(factors: NDArray[np.float32]) -> Callable[[slice], NDArray[np.float32]]:
        of_scales = factors.reshape(scales.shape)
        return lambda rows: np.repeat(of_scales[rows], width, axis=1)

    def load() -> Decode:
        if layout.bits != 4:
            return codes.decoder(dtype)
        scales_of, pairs = scales_of_rows(), pairs_of_bytes(values)

        def decode(rows: slice, packed: Bytes) -> NDArray[Any]:
            own = scales_of(rows)
            return scaled(pairs.take(packed).view(np.float32).reshape(len(own), -1), own, dtype)

        return decode

    layout = PackedRows(len(values).bit_length() - 1, columns, numbers.row_bytes)
    codes = StoredCodes(shape, False, values, layout, grid)
    scaling = ScaleRule(scales.name, read, spread, reach, decode_scales, encode)
    return QuantisedTensor(name, shape, dtype, numbers.name, every, scheme, load, codes=codes, scaling=scaling)
