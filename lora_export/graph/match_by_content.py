"""Names by content: which tensor of a base checkpoint a weight of a graph holds, as a whole or in a block.

A few entries at places that depend on the shape alone are compared first, so that each tensor is sampled once and
a thousand candidates cost one look into a table; what agrees there is compared whole before it is believed.
Memory stays small: both sides are read in tiles.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.graph.quantised.layouts import Quantised
from lora_export.graph.readers import Site
from lora_export.plan import FLOATS, Layout
from lora_export.storage import block_copy
from lora_export.weights.checkpoint import Checkpoint

SAMPLE = 128  # entries of a tensor that are compared first
TILE = 1 << 23  # bytes of a tensor that are compared at once
# ‖quantised − W‖ / ‖W‖. Measured on normal, heavy-tailed and MiniLM's weights, blocks of 16 to 256, symmetric or not:
# 8 bits 0.004 to 0.02, 4 bits 0.07 to 0.30 (0.09 in blocks of 32), 2 bits 0.31 to 0.61; of any other weight of that
# norm 1.3 and more, and never below 1, whatever its norm, where the two have nothing to do with each other.
NEAR = 0.7

HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))

Shape = tuple[int, int]
Casts = tuple[np.dtype[Any], ...]  # that the base's numbers went through; empty where they were quantised
Places = tuple[NDArray[np.int64], NDArray[np.int64]]


class Matrix(Protocol):
    """Numbers in rows and columns, wherever they are."""

    @property
    def shape(self) -> Shape: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def tile(self, rows: range, columns: range) -> NDArray[Any]: ...
    def at(self, places: Places) -> NDArray[Any]: ...


class View(NamedTuple):
    """A tensor of the base, as it is or as its transpose."""

    name: str
    turned: bool


class Match(NamedTuple):
    """Output features [start, stop) of a weight, and what the base has of this content: a tensor, none, or several."""

    start: int
    stop: int
    views: tuple[View, ...]


class Base:
    """A checkpoint's float tensors, by what is in them. Reads headers, and then what is asked for."""

    def __init__(self, checkpoint: Checkpoint):
        self.path = checkpoint.path
        self.matrices: dict[str, Matrix] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.of_shape: dict[Shape, list[View]] = {}
        for shard in checkpoint.shards.values():
            for entry in shard.entries.values():
                if str(entry.dtype) in FLOATS and entry.nbytes:
                    rows = _as_rows(entry.shape)
                    self.matrices[entry.name] = OnDisk(shard.path, entry.start, entry.dtype, rows)
                    self.shapes[entry.name] = entry.shape
                    self.of_shape.setdefault(rows, []).append(View(entry.name, turned=False))
                    if len(entry.shape) == 2:
                        self.of_shape.setdefault(rows[::-1], []).append(View(entry.name, turned=True))
        self.samples: dict[View, NDArray[Any]] = {}
        self.tables: dict[tuple[Shape, Casts], dict[bytes, list[View]]] = {}
        self.endings: dict[str, str] = {}  # a name without what stands before a dot -> the name; empty: of several
        for name in self.matrices:
            for ending in _endings(name):
                self.endings[ending] = "" if ending in self.endings else name

    def spelled(self, name: str) -> str:
        """The base's own spelling of a name that may carry or lack a prefix of whole parts; empty where it has none."""
        if name in self.matrices or not name:
            return name
        longer = next((ending for ending in _endings(name) if ending in self.matrices), "")
        return longer or self.endings.get(name, "")

    def is_held(self, name: str, site: Site) -> View | None:
        """How the site holds this very tensor; None where it does not."""
        held = _matrix(site)
        for view in (View(name, turned=False), View(name, turned=True)):
            shape = self._seen(view).shape
            if shape == held.shape and self._suits(view, site):
                sample = held.at(_places(shape))
                if any(
                    self._is(held, 0, view, casts) for casts in _casts(site, sample) if self._fits(sample, view, casts)
                ):
                    return view
        return None

    def matches(self, site: Site) -> Iterator[Match]:
        """What the site's weight is made of, from its first output feature to its last.

        Where nothing answers, or tensors of several sizes do, the rest is one match without a view, or with all those
        views. A constant names nothing.
        """
        held, start = _matrix(site), 0
        out, inner = held.shape
        while start < out:
            sizes = self._sizes(inner, out - start) if _is_matrix(site) else [out]
            found = {size: self._found(site, held, start, size) for size in sizes}
            found = {size: views for size, views in found.items() if views}
            if len(found) != 1:
                yield Match(start, out, tuple(view for views in found.values() for view in views))
                return
            ((size, views),) = found.items()
            yield Match(start, start + size, tuple(views))
            start += size

    def _sizes(self, inner: int, most: int) -> list[int]:
        """How many output features the base's matrices with so many inputs have."""
        return [size for size, wide in self.of_shape if wide == inner and size <= most]

    def _suits(self, view: View, site: Site) -> bool:
        """Whether a linear layer's matrix may lie so; all else (a vector, a kernel, an embedding) lies as it is."""
        shape = self.shapes[view.name]
        return len(shape) == 2 if _is_matrix(site) else shape == site.shape and not view.turned

    def _found(self, site: Site, held: Matrix, start: int, size: int) -> list[View]:
        """What of this size the held output features from `start` on are."""
        shape = (size, held.shape[1])
        if shape not in self.of_shape:
            return []
        rows, columns = _places(shape)
        sample = held.at((rows + start, columns))
        if (sample == sample[0]).all():
            return []  # zeros or ones are alike wherever they come from
        found: dict[str, View] = {}
        for casts in _casts(site, sample):
            for view in self._likely(shape, sample, casts):
                if view.name not in found and self._suits(view, site) and self._is(held, start, view, casts):
                    found[view.name] = view
        return list(found.values())

    def _likely(self, shape: Shape, sample: NDArray[Any], casts: Casts) -> list[View]:
        if not casts:
            return [view for view in self.of_shape[shape] if self._fits(sample, view, casts)]
        if (shape, casts) not in self.tables:
            table = self.tables[shape, casts] = {}
            for view in self.of_shape[shape]:
                table.setdefault(_bits(_cast(self._sample(view), casts)).tobytes(), []).append(view)
        return self.tables[shape, casts].get(_bits(sample).tobytes(), [])

    def _fits(self, sample: NDArray[Any], view: View, casts: Casts) -> bool:
        """Whether a sample is the view's, or lies near it."""
        if casts:
            return bool(np.array_equal(_bits(sample), _bits(_cast(self._sample(view), casts))))
        return _distance(sample, self._sample(view)) < NEAR

    def _is(self, held: Matrix, start: int, view: View, casts: Casts) -> bool:
        """Whether the held rows from `start` on are the view, to the last bit; quantised ones, whether they are near.

        Compared along the rows in which `held` is stored, which are read as they come.
        """
        ours, theirs, offset = held, self._seen(view), (start, 0)
        if isinstance(ours, Turned):
            ours, theirs, offset = ours.inner, Turned(theirs).plain(), (0, start)
        error = norm = 0.0
        for rows, columns in _tiles(theirs):
            one = ours.tile(_moved(rows, offset[0]), _moved(columns, offset[1]))
            other = theirs.tile(rows, columns)
            if not casts:
                error += float(np.square(one - other.astype(np.float32), dtype=np.float64).sum())
                norm += float(np.square(other.astype(np.float32), dtype=np.float64).sum())
            elif not np.array_equal(_bits(one), _bits(_cast(other, casts))):
                return False
        return bool(casts) or error < NEAR**2 * norm

    def _seen(self, view: View) -> Matrix:
        matrix = self.matrices[view.name]
        return Turned(matrix) if view.turned else matrix

    def _sample(self, view: View) -> NDArray[Any]:
        if view not in self.samples:
            matrix = self._seen(view)
            self.samples[view] = matrix.at(_places(matrix.shape))
        return self.samples[view]


@dataclass(frozen=True, eq=False)
class OnDisk:
    """A matrix in a file, row after row."""

    path: Path
    start: int  # its first byte
    dtype: np.dtype[Any]
    shape: Shape

    def tile(self, rows: range, columns: range) -> NDArray[Any]:
        width = self.shape[1]
        if len(columns) == width:
            pieces, length = [rows.start * width], len(rows) * width
        else:
            pieces, length = [row * width + columns.start for row in rows], len(columns)
        return self._read(pieces, length).reshape(len(rows), len(columns))

    def at(self, places: Places) -> NDArray[Any]:
        rows, columns = places
        return self._read((rows * self.shape[1] + columns).tolist(), 1).reshape(-1)

    def _read(self, pieces: Sequence[int], length: int) -> NDArray[Any]:
        """Pieces of so many numbers each, by the number that each starts with; a row for each."""
        size = self.dtype.itemsize
        data = np.empty((len(pieces), length * size), np.uint8)
        with self.path.open("rb", buffering=0) as file:
            for row, first in zip(data, pieces, strict=True):
                block_copy.read(self.path, file.fileno(), row, self.start + first * size)
        return data.view(self.dtype)


@dataclass(frozen=True, eq=False)
class InMemory:
    """A matrix that the graph itself holds."""

    array: NDArray[Any]

    @property
    def shape(self) -> Shape:
        return self.array.shape[0], self.array.shape[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def tile(self, rows: range, columns: range) -> NDArray[Any]:
        return self.array[rows.start : rows.stop, columns.start : columns.stop]

    def at(self, places: Places) -> NDArray[Any]:
        return self.array[places]


@dataclass(frozen=True, eq=False)
class Dequantising:
    """A quantised matrix, as it computes."""

    quantised: Quantised

    @property
    def shape(self) -> Shape:
        return self.quantised.shape[0], self.quantised.shape[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32)

    def tile(self, rows: range, columns: range) -> NDArray[Any]:
        return self.quantised.rows(slice(rows.start, rows.stop))[:, columns.start : columns.stop]

    def at(self, places: Places) -> NDArray[Any]:
        rows, back = np.unique(places[0], return_inverse=True)
        return self.quantised.rows(rows)[back, places[1]]


@dataclass(frozen=True, eq=False)
class Turned:
    """A matrix, seen the other way round."""

    inner: Matrix

    def plain(self) -> Matrix:
        """The same without turning twice."""
        return self.inner.inner if isinstance(self.inner, Turned) else self

    @property
    def shape(self) -> Shape:
        return self.inner.shape[::-1]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.inner.dtype

    def tile(self, rows: range, columns: range) -> NDArray[Any]:
        return self.inner.tile(columns, rows).T

    def at(self, places: Places) -> NDArray[Any]:
        return self.inner.at(places[::-1])


def _matrix(site: Site) -> Matrix:
    """A site's weight in the (out, in) view; whatever is no linear layer's, as its rows."""
    matrix: Matrix
    tensor = site.tensor
    if site.quantised is not None:
        matrix = Dequantising(site.quantised)
    elif isinstance(tensor, ir.ExternalTensor):
        matrix = OnDisk(Path(tensor.path), tensor.offset or 0, tensor.dtype.numpy(), _as_rows(site.shape))
    else:
        matrix = InMemory(tensor.numpy().reshape(_as_rows(site.shape)))
    return Turned(matrix) if site.layout is Layout.IN_OUT else matrix


def _is_matrix(site: Site) -> bool:
    return site.is_linear and len(site.shape) == 2


def _as_rows(shape: Sequence[int]) -> Shape:
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


@functools.cache
def _places(shape: Shape) -> Places:
    count = math.prod(shape)
    chosen = np.arange(count) if count <= SAMPLE else np.random.default_rng(shape).integers(0, count, SAMPLE)
    rows, columns = np.divmod(np.sort(chosen), shape[1])
    return rows, columns


def _tiles(matrix: Matrix) -> Iterator[tuple[range, range]]:
    """What to compare at once: whole rows, and of a matrix that is seen the other way round, squares.

    A tile that is narrow either way would be read in a great many small pieces. The first is small: most differences
    show there.
    """
    rows, columns = matrix.shape
    fit = max(1, TILE // matrix.dtype.itemsize)
    width = min(columns, math.isqrt(fit)) if isinstance(matrix, Turned) else columns
    starts = [0, 8, *range(max(9, fit // width), rows, max(1, fit // width))]
    for first, last in itertools.pairwise([*(start for start in starts if start < rows), rows]):
        for left in range(0, columns, width):
            yield range(first, last), range(left, min(left + width, columns))


def _moved(part: range, by: int) -> range:
    return range(part.start + by, part.stop + by)


def _casts(site: Site, sample: NDArray[Any]) -> Iterator[Casts]:
    """How the base's numbers may have come to the site: rounded to its dtype, perhaps to half precision before that."""
    if site.quantised is not None:
        yield ()
        return
    yield (sample.dtype,)
    for half in HALVES if sample.dtype.itemsize > 2 else ():
        if np.array_equal(_bits(_cast(sample, (half, sample.dtype))), _bits(sample)):
            yield (half, sample.dtype)


def _cast(array: NDArray[Any], casts: Casts) -> NDArray[Any]:
    with np.errstate(over="ignore"):  # what lies beyond float16 was made infinite there, too
        for dtype in casts:
            array = array.astype(dtype, copy=False)
    return array


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    """Numbers as the integers of their bits: NaN equals itself, and 0 is not -0."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def _distance(one: NDArray[Any], other: NDArray[Any]) -> float:
    wide = other.astype(np.float64)
    norm = float(np.linalg.norm(wide))
    return float(np.linalg.norm(one - wide)) / norm if norm > 0 and math.isfinite(norm) else math.inf


def _endings(name: str) -> Iterator[str]:
    """`a.b.weight` -> `b.weight`; the last part alone names nothing."""
    parts = name.split(".")
    for first in range(1, len(parts) - 1):
        yield ".".join(parts[first:])
