"""A part of a stored tensor that is the weight of a module of its own, such as the rows of q in a fused q|k|v."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lora_export.lora import EVERY_ROW, split_part

INDEX = re.compile(r"(?P<number>\d{1,9})|:|(?P<start>\d{1,9}):(?P<stop>\d{1,9})(:(?P<step>\d{1,9}))?")


@dataclass(frozen=True)
class StoredRegion:
    """Rows and columns of a stored tensor.

    `shape` is the shape in which the tensor is cut: that of the file, or of the same entries with other dimensions
    ((experts * out, in) for experts of (out, in)). `rows` has no step. `columns` may have one.
    """

    tensor: str  # its name in the file
    shape: tuple[int, ...]
    rows: slice
    columns: slice = field(default_factory=lambda: EVERY_ROW)
    written: str = ""  # the indices in the shape of the file, as Python writes them

    @property
    def name(self) -> str:
        """A name for the part: `layers.0.qkv.weight[0:64]`."""
        return f"{self.tensor}[{self.written}]"

    @property
    def cut_shape(self) -> tuple[int, ...]:
        """The shape of the part."""
        rows = self.rows.stop - self.rows.start
        if self.columns == EVERY_ROW:
            return (rows, *self.shape[1:])
        return (rows, len(range(*self.columns.indices(self.shape[1]))))

    def overlaps(self, other: StoredRegion) -> bool:
        """Whether two parts of one tensor share an entry; True where they are cut in different shapes."""
        if self.shape != other.shape:
            return True
        rows = bool(max(self.rows.start, other.rows.start) < min(self.rows.stop, other.rows.stop))
        if not rows or EVERY_ROW in (self.columns, other.columns):
            return rows
        own, others = (set(range(*each.columns.indices(self.shape[1]))) for each in (self, other))
        return not own.isdisjoint(others)


def overlapping(regions: Mapping[str, StoredRegion]) -> list[tuple[str, str]]:
    """The names of those of these parts of one tensor that share an entry, two by two, in the order of the names.

    Only parts with rows in common are compared: a stack of experts has thousands, each with rows of its own.
    """
    is_cut_alike = len({region.shape for region in regions.values()}) <= 1
    pairs = _with_common_rows(regions) if is_cut_alike else itertools.combinations(regions, 2)
    position = {name: number for number, name in enumerate(regions)}
    found = [(one, other) for one, other in pairs if regions[one].overlaps(regions[other])]
    in_order = [(one, other) if position[one] < position[other] else (other, one) for one, other in found]
    return sorted(in_order, key=lambda pair: (position[pair[0]], position[pair[1]]))


def _with_common_rows(regions: Mapping[str, StoredRegion]) -> Iterator[tuple[str, str]]:
    """The parts that begin before another one's rows end, two by two."""
    open_parts: list[str] = []
    for name in sorted(regions, key=lambda name: regions[name].rows.start):
        open_parts = [other for other in open_parts if regions[other].rows.stop > regions[name].rows.start]
        yield from ((other, name) for other in open_parts)
        open_parts.append(name)


def cut(tensor: str, shape: Sequence[int], selection: Sequence[slice | int]) -> StoredRegion | None:
    """The region of a stored tensor that these indices select, one for each axis; None where it is none.

    The indices of the first axes may be numbers (an expert). Then come rows, whose step may be more than 1 where they
    divide the axis evenly, and columns. Further axes are selected whole.
    """
    fixed = [index for index in selection if isinstance(index, int)]
    slices = [index for index in selection if isinstance(index, slice)]
    if not slices or list(selection[: len(fixed)]) != fixed:
        return None
    sizes = shape[len(fixed) :]
    rows, *columns = slices
    before = 0  # fixed indices, as a number of blocks of rows
    for index, size in zip(fixed, shape, strict=False):
        before = before * size + index
    whole_columns = all(_is_whole(each, size) for each, size in zip(columns, sizes[1:], strict=True))
    if len(columns) > 1 and not whole_columns:
        return None
    step = rows.step or 1
    if step > 1 and (sizes[0] % step or len(range(*rows.indices(sizes[0]))) != sizes[0] // step or len(sizes) != 2):
        return None
    written = _written(selection, shape)
    count = len(range(*rows.indices(sizes[0])))
    if step == 1:
        flat = (math.prod(shape[: len(fixed)]) * sizes[0], *sizes[1:])
        first = before * sizes[0] + rows.start
        column = EVERY_ROW if whole_columns else columns[0]
        return StoredRegion(tensor, flat, slice(first, first + count), column, written)
    # Every second row: the rows of a pair are beside each other in a matrix of half as many rows.
    if columns[0].step not in (None, 1):
        return None
    width, first = sizes[1], before * (sizes[0] // step)
    flat = (math.prod(shape[: len(fixed)]) * sizes[0] // step, step * width)
    offset = rows.start * width
    column = slice(offset + columns[0].start, offset + columns[0].stop)
    return StoredRegion(tensor, flat, slice(first, first + count), column, written)


def parse(name: str, shape: Sequence[int]) -> StoredRegion | None:
    """The region of a tensor of this shape that has this name, such as `t[3, 0:16]`. None where no region has it."""
    tensor, indices = split_part(name)
    texts = indices.split(",") if indices else []
    if not texts or len(texts) > len(shape):
        return None
    selection: list[slice | int] = []
    for text, size in zip([*texts, *[":"] * (len(shape) - len(texts))], shape, strict=True):
        found = INDEX.fullmatch(text.strip())
        if found is None:
            return None
        if found["number"]:
            selection.append(int(found["number"]))
        elif found["start"]:
            step = int(found["step"]) if found["step"] else None
            selection.append(slice(int(found["start"]), int(found["stop"]), step))
        else:
            selection.append(slice(0, size))
        chosen = selection[-1]
        last = chosen if isinstance(chosen, int) else chosen.stop - 1
        is_empty = isinstance(chosen, slice) and (chosen.start >= chosen.stop or chosen.step == 0)
        if last >= size or (is_empty and chosen != slice(0, size)):
            return None
    region = cut(tensor, shape, selection)
    return region if region is not None and region.name == name else None


def as_slice(indices: NDArray[np.int64]) -> slice | None:
    """Ascending indices as a slice; None where their steps differ."""
    first, last = int(indices[0]), int(indices[-1])
    if len(indices) == 1:
        return slice(first, first + 1)
    step = int(indices[1]) - first
    if step < 1 or not np.array_equal(indices, np.arange(first, last + 1, step)):
        return None
    return slice(first, last + 1, step) if step > 1 else slice(first, last + 1)


def _is_whole(index: slice, size: int) -> bool:
    return len(range(*index.indices(size))) == size


def _written(selection: Sequence[slice | int], shape: Sequence[int]) -> str:
    parts = []
    for index, size in zip(selection, shape, strict=True):
        if isinstance(index, int):
            parts.append(str(index))
        elif _is_whole(index, size):
            parts.append(":")
        else:
            parts.append(f"{index.start}:{index.stop}" + (f":{index.step}" if index.step not in (None, 1) else ""))
    while len(parts) > 1 and parts[-1] == ":":
        parts.pop()
    return ", ".join(parts)
