"""The numbers of a quantised weight as codes of up to 16 bits, in the order of their file: read, and written again.

    W = (value of the code - zero point) * scale

A scheme states the value of each code, where the codes of some rows are, and their scales and zero points. `nearest`
is the inverse on these scales. A number keeps its code where another one has the same value (0 and -0), or where its
scale is zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lora_export.storage import block_copy
from lora_export.storage.block_copy import Bytes
from lora_export.weights.quantised.packed_numbers import pack, unpack

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
EVERY_BYTE = np.arange(256, dtype=np.uint8)


def _values_of(dtype: np.dtype[Any]) -> NDArray[np.float32]:
    values = EVERY_BYTE.view(dtype).astype(np.float32)
    return np.where(np.isfinite(values), values, np.float32(np.nan))


# Name of a dtype -> the dtype, and the value of each byte
FLOAT8_KINDS = {str(dtype): (dtype, _values_of(dtype)) for dtype in (FLOAT8, np.dtype(ml_dtypes.float8_e5m2))}
FLOAT8_VALUES = FLOAT8_KINDS[str(FLOAT8)][1]
MOST_BINS = 1 << 14
INT8_VALUES = EVERY_BYTE.view(np.int8).astype(np.float32)

Numbers = NDArray[Any]  # codes, (rows, columns): bytes, or uint16 where a byte is too short
# Rows in the order of the file -> their scales in fp32, and their zero points or None. Both can be broadcast to
# (rows, columns).
Grid = Callable[[slice], tuple[NDArray[np.float32], NDArray[Any] | None]]


@dataclass(frozen=True, eq=False)
class StoredCodes:
    """How the numbers of a weight are stored."""

    shape: tuple[int, int]  # rows whose bytes follow each other, and columns
    is_turned: bool  # whether these rows are the columns of the weight, or of each of its experts
    values: NDArray[np.float32]  # of each code; NaN where it is none
    layout: CodeLayout
    load: Callable[[], Grid]  # reads scales and zero points. Raises InputRefused for parts that do not fit
    has_float_zeros: bool = False  # whether a zero point may be between two integers

    @functools.cached_property
    def are_integers(self) -> bool:
        """Whether the values are consecutive integers."""
        ordered = np.sort(self.values)
        return bool(np.array_equal(ordered, ordered[0] + np.arange(len(ordered))))

    @functools.cached_property
    def _first_of_equal(self) -> Numbers | None:
        """For each code the first one of its value; None where all values are different."""
        _, first, same = np.unique(self.values, return_index=True, return_inverse=True, equal_nan=False)
        return None if len(first) == len(self.values) else first[same].astype(np.uint8)

    @functools.cached_property
    def _search(self) -> Callable[[NDArray[np.float32]], Numbers]:
        return nearest_among(self.values)

    def weight(self, codes: Numbers, scales: NDArray[np.float32], zeros: NDArray[Any] | None) -> NDArray[np.float32]:
        """(value - zero point) * scale in fp32."""
        if not self.are_integers:
            found = self.values.take(codes)
        else:  # faster than a look-up
            found = (codes.view(np.int8) if self.values is INT8_VALUES else codes).astype(np.float32)
            if self.values[0]:
                found += self.values[0]
        if zeros is not None:
            found -= zeros
        found *= scales
        return found

    def decoder(self, dtype: np.dtype[Any]) -> Callable[[slice, Bytes], NDArray[Any]]:
        """What makes rows from their bytes, rounded once to a dtype. Reads scales and zero points."""
        of_rows = self.load()

        def decode(rows: slice, packed: Bytes) -> NDArray[Any]:
            return self.weight(self.layout.unpack(rows, packed), *of_rows(rows)).astype(dtype)

        return decode

    def nearest(
        self, weight: NDArray[np.float32], scales: NDArray[np.float32], zeros: NDArray[Any] | None, old: Numbers
    ) -> Numbers:
        """The codes whose values are the nearest to a weight; `old` are those before. Beyond the last value, the last.

        `weight` is overwritten. Its values are finite.
        """
        with np.errstate(all="ignore"):  # scales of zero
            weight /= scales
            if self.are_integers and not self.has_float_zeros:
                # The zero point is added to an integer: to a fraction it would be rounded.
                np.rint(weight, out=weight)
            if zeros is not None:
                weight += zeros
            if self.has_float_zeros:
                np.rint(weight, out=weight)
            found = self._rounded(weight)
        self._keep_equal(found, old)
        if not scales.all():
            np.copyto(found, old, where=scales == 0)
        return found

    def _keep_equal(self, found: Numbers, old: Numbers) -> None:
        """Put the old codes where they have the same value."""
        first = self._first_of_equal
        if first is not None:
            np.copyto(found, old, where=first.take(found) == first.take(old))

    @functools.cached_property
    def _neighbours(self) -> tuple[Numbers, Numbers]:
        """For each code that of the next smaller value, and that of the next larger one; at an end, of its own."""
        ordered, first = np.unique(self.values[np.isfinite(self.values)], return_index=True)
        codes = np.flatnonzero(np.isfinite(self.values))[first].astype(np.uint8)
        places = np.searchsorted(ordered, self.values)
        below, above = (codes[np.clip(places + step, 0, len(codes) - 1)] for step in (-1, 1))
        return below, above

    def beyond(
        self,
        weight: NDArray[np.float32],
        scales: NDArray[np.float32],
        zeros: NDArray[Any] | None,
        nearest: Numbers,
        old: Numbers,
    ) -> Numbers:
        """The codes of the values on the other side of a weight than the nearest; these, where there is none."""
        values = self.weight(nearest, scales, zeros)
        below, above = (codes.take(nearest) for codes in self._neighbours)
        found = np.where((weight > values) == (scales > 0), above, below)
        np.copyto(found, nearest, where=(weight == values) | (scales == 0))
        self._keep_equal(found, old)
        return found

    def _rounded(self, numbers: NDArray[np.float32]) -> Numbers:
        if self.are_integers:
            np.clip(numbers, self.values.min(), self.values.max(), out=numbers)
            if len(self.values) > len(EVERY_BYTE):
                numbers -= self.values[0]
                return numbers.astype(np.uint16)
            return (numbers.astype(np.int16) - np.int16(self.values[0])).astype(np.uint8)
        for dtype, values in FLOAT8_KINDS.values():
            if self.values is values:
                largest = float(ml_dtypes.finfo(dtype).max)
                return np.clip(numbers, -largest, largest, out=numbers).astype(dtype).view(np.uint8)
        return self._search(numbers)


def nearest_among(values: NDArray[np.float32]) -> Callable[[NDArray[np.float32]], Numbers]:
    """What finds the codes of the nearest of a few values.

    One look-up instead of a search: the range is cut into bins, each with one middle between two values at most.
    """
    ordered, first = np.unique(values[np.isfinite(values)], return_index=True)
    codes = np.flatnonzero(np.isfinite(values))[first].astype(np.uint8)
    middles = (ordered[1:] + ordered[:-1]) / np.float32(2)
    gap = np.diff(middles).min(initial=np.inf)
    bins = 2 * (middles[-1] - middles[0]) / gap + 2 if gap and middles.size else np.inf
    if not bins <= MOST_BINS:
        return lambda numbers: codes.take(np.searchsorted(middles, numbers))
    lowest, per_unit = middles[0], np.float32(2 / gap)

    def bin_of(numbers: NDArray[np.float32]) -> NDArray[np.intp]:
        found = (numbers - lowest) * per_unit
        within: NDArray[np.float32] = np.fmin(np.fmax(found, 0, out=found), int(bins), out=found)  # NaN: 0
        return within.astype(np.intp)

    own, every = bin_of(middles), np.arange(int(bins) + 1)
    limits = np.full(len(every), np.inf, np.float32)
    limits[own] = middles
    below = np.searchsorted(own, every)
    at_most, above = codes[below], codes[below + np.isfinite(limits)]

    def nearest(numbers: NDArray[np.float32]) -> Numbers:
        places = bin_of(numbers)
        return np.where(numbers > limits.take(places), above.take(places), at_most.take(places))

    return nearest


def read_numbers(codes: StoredCodes, path: Path, fd: int, start: int, rows: slice) -> Numbers:
    """Any rows, from the file that has the packed numbers from `start` on. Raises InputRefused where it ends before."""
    least = codes.layout.rows_together
    whole = slice(rows.start // least * least, min(-(-rows.stop // least) * least, codes.shape[0]))
    first, last = codes.layout.extent(whole)
    packed = np.empty(last - first, np.uint8)
    block_copy.read(path, fd, packed, start + first)
    return codes.layout.unpack(whole, packed)[rows.start - whole.start : rows.stop - whole.start]


# --- Where the codes of some rows are ---


class CodeLayout(Protocol):
    """How the codes of consecutive rows are packed."""

    @property
    def rows_together(self) -> int:
        """Blocks of rows begin at multiples of it."""

    def extent(self, rows: slice) -> tuple[int, int]:
        """The bytes that have these rows: the first, and the one behind the last."""

    def unpack(self, rows: slice, packed: Bytes) -> Numbers:
        """These rows, (rows, columns), from their bytes."""

    def pack(self, codes: Numbers, packed: Bytes) -> None:
        """Write rows into their bytes, whose padding stays as it is."""


@dataclass(frozen=True)
class PackedRows:
    """Rows of numbers that follow each other from the lowest bit on, each padded to whole bytes."""

    bits: int
    columns: int
    row_bytes: int
    is_high_first: bool = False  # whether the first of two numbers of 4 bits is in the high half
    rows_together: int = 1

    def extent(self, rows: slice) -> tuple[int, int]:
        return rows.start * self.row_bytes, rows.stop * self.row_bytes

    def unpack(self, rows: slice, packed: Bytes) -> Numbers:
        words = packed.reshape(rows.stop - rows.start, -1)
        codes = unpack(words if self.bits in (4, 8) else words.view(np.uint32), self.bits, self.columns)
        return _swapped(codes) if self.is_high_first else codes

    def pack(self, codes: Numbers, packed: Bytes) -> None:
        pack(_swapped(codes) if self.is_high_first else codes, self.bits, packed.reshape(len(codes), -1))


def _swapped(codes: Numbers) -> Numbers:
    """The numbers of each byte in the other order."""
    return codes.reshape(len(codes), -1, 2)[:, :, ::-1].reshape(len(codes), -1)
