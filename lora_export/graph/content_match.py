"""Which tensor of a base checkpoint a weight of a graph equals, as a whole or block by block.

A sample of each tensor is compared first. Its positions depend on the shape alone, so each tensor is sampled once and
all candidates of one shape cost one lookup in a table. Tensors whose samples agree are then compared in full. Memory
stays small: both tensors are read in tiles.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.graph.quantised_weights import QuantisedWeight
from lora_export.graph.site import Site
from lora_export.lora import expert_name
from lora_export.plan import FLOATS, Layout
from lora_export.plan.match_names import endings
from lora_export.storage import block_copy
from lora_export.storage.safetensors_file import Entry
from lora_export.weights.checkpoint import Checkpoint

Shape = tuple[int, int]
Positions = tuple[NDArray[np.int64], NDArray[np.int64]]  # row and column numbers


@dataclass(frozen=True, eq=False)
class Matrix:
    """Numbers in rows and columns, read piece by piece: rows and columns of them, or single ones at positions."""

    shape: Shape
    dtype: np.dtype[Any]
    tile: Callable[[range, range], NDArray[Any]]
    at: Callable[[Positions], NDArray[Any]]
    inner: Matrix | None = None  # whose transpose it is

    @property
    def transposed(self) -> Matrix:
        """The transpose; of a transpose, the matrix itself."""
        if self.inner is not None:
            return self.inner
        return Matrix(
            self.shape[::-1],
            self.dtype,
            lambda rows, columns: self.tile(columns, rows).T,
            lambda positions: self.at(positions[::-1]),
            self,
        )


def file_matrix(path: Path, start: int, dtype: np.dtype[Any], shape: Shape) -> Matrix:
    """A matrix in a file from a byte on, row after row. Reads only the bytes that are requested."""
    width = shape[1]

    def read(starts: Sequence[int], length: int) -> NDArray[Any]:
        """`length` numbers from each start, which counts numbers: (starts, length)."""
        data = np.empty((len(starts), length * dtype.itemsize), np.uint8)
        with path.open("rb", buffering=0) as file:
            for row, first in zip(data, starts, strict=True):
                block_copy.read(path, file.fileno(), row, start + first * dtype.itemsize)
        return data.view(dtype)

    def tile(rows: range, columns: range) -> NDArray[Any]:
        if len(columns) == width:
            return read([rows.start * width], len(rows) * width).reshape(len(rows), width)
        return read([row * width + columns.start for row in rows], len(columns))

    return Matrix(shape, dtype, tile, lambda at: read((at[0] * width + at[1]).tolist(), 1).reshape(-1))


def array_matrix(array: NDArray[Any]) -> Matrix:
    """A matrix in memory."""
    rows, columns = array.shape
    return Matrix(
        (rows, columns),
        array.dtype,
        lambda own, other: array[own.start : own.stop, other.start : other.stop],
        array.__getitem__,
    )


def dequantised_matrix(quantised: QuantisedWeight) -> Matrix:
    """A quantised matrix, dequantised row by row."""

    def at(positions: Positions) -> NDArray[Any]:
        rows, inverse = np.unique(positions[0], return_inverse=True)
        return quantised.rows(rows)[inverse, positions[1]]

    def tile(rows: range, columns: range) -> NDArray[Any]:
        return quantised.rows(slice(rows.start, rows.stop))[:, columns.start : columns.stop]

    return Matrix((quantised.shape[0], quantised.shape[1]), np.dtype(np.float32), tile, at)


def matrix_of(site: Site) -> Matrix:
    """The weight of a linear layer as (out, in). Any other weight as its rows."""
    tensor = site.tensor
    if site.quantised is not None:
        matrix = dequantised_matrix(site.quantised)
    elif isinstance(tensor, ir.ExternalTensor):
        dtype = tensor.dtype.numpy()
        before = (site.expert or 0) * math.prod(site.shape) * dtype.itemsize
        matrix = file_matrix(Path(tensor.path), (tensor.offset or 0) + before, dtype, as_rows(site.shape))
    else:
        matrix = array_matrix(site.array.reshape(as_rows(site.shape)))
    return matrix.transposed if site.layout is Layout.IN_OUT else matrix


def as_rows(shape: Sequence[int]) -> Shape:
    """The shape of a tensor as a matrix whose columns are all dimensions but the first."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


SAMPLE_SIZE = 128  # entries of a tensor
TILE_BYTES = 1 << 23
# Largest ‖quantised − W‖ / ‖W‖ at which a quantised weight counts as W. Measured on normal, heavy-tailed and MiniLM's
# weights, blocks of 16 to 256, symmetric or not: 8 bits 0.004 to 0.02, 4 bits 0.07 to 0.30 (0.09 in blocks of 32),
# 2 bits 0.31 to 0.61. An unrelated weight of the same norm has 1.3 and more, and of any norm at least 1.
MAX_QUANTISATION_ERROR = 0.7

NUMPY_HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))

Casts = tuple[np.dtype[Any], ...]  # that were applied to the base's numbers; empty where they were quantised


class BaseView(NamedTuple):
    """A tensor of the base, or its transpose."""

    name: str
    is_transposed: bool


class ContentMatch(NamedTuple):
    """Output features [start, stop) of a weight, and the base's tensors with this content: none, one or several."""

    start: int
    stop: int
    views: tuple[BaseView, ...]


class Spellings:
    """Parameters by names that may have or lack leading parts."""

    def __init__(self, names: Collection[str]):
        self.names = names
        self.by_ending: dict[str, str] = {}  # name without its first parts -> name; empty where several have it
        for name in names:
            for ending in _endings(name):
                self.by_ending[ending] = "" if ending in self.by_ending else name

    def of(self, name: str) -> str:
        """The name that a parameter has here. Empty where there is none."""
        if name in self.names or not name:
            return name
        without_prefix = next((ending for ending in _endings(name) if ending in self.names), "")
        return without_prefix or self.by_ending.get(name, "")


class ContentIndex:
    """The float tensors of a checkpoint, searched by content. Reads headers first, and tensors when they are needed."""

    def __init__(self, checkpoint: Checkpoint, experts: Collection[tuple[int, ...]] = ()):
        """`experts` are the shapes of matrices that may be stacked in one tensor; of a transpose, the same, sorted."""
        self.path = checkpoint.path
        self.matrices: dict[str, Matrix] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.views_by_shape: dict[Shape, list[BaseView]] = {}
        for shard in checkpoint.shards.values():
            for entry in shard.entries.values():
                if str(entry.dtype) in FLOATS and entry.nbytes:
                    rows = as_rows(entry.shape)
                    self.matrices[entry.name] = file_matrix(shard.path, entry.start, entry.dtype, rows)
                    self.shapes[entry.name] = entry.shape
                    self.views_by_shape.setdefault(rows, []).append(BaseView(entry.name, False))
                    if len(entry.shape) == 3 and tuple(sorted(entry.shape[1:])) in experts:
                        self._add_experts(shard.path, entry)
                    if len(entry.shape) == 2:
                        self.views_by_shape.setdefault(rows[::-1], []).append(BaseView(entry.name, True))
        self.samples: dict[BaseView, NDArray[Any]] = {}
        self.sample_tables: dict[tuple[Shape, Casts], dict[bytes, list[BaseView]]] = {}
        self.spelling_of = Spellings(self.matrices).of

    def _add_experts(self, path: Path, entry: Entry) -> None:
        """The matrices of a tensor that may stack those of experts. They are found by name alone, not by content."""
        count, *matrix = entry.shape
        for expert in range(count):
            name, start = expert_name(entry.name, expert), entry.start + expert * entry.row_bytes
            self.matrices[name] = file_matrix(path, start, entry.dtype, as_rows(matrix))
            self.shapes[name] = tuple(matrix)

    def view_equal_to(self, name: str, site: Site) -> BaseView | None:
        """The view of this tensor that equals the site's weight. None where neither it nor its transpose does."""
        matrix = matrix_of(site)
        for view in (BaseView(name, False), BaseView(name, True)):
            shape = self._matrix(view).shape
            if shape == matrix.shape and self._suits(view, site):
                sample = matrix.at(_sample_positions(shape))
                likely = (casts for casts in _possible_casts(site, sample) if self._sample_fits(sample, view, casts))
                if any(self._equals(matrix, 0, view, casts) for casts in likely):
                    return view
        return None

    def matches(self, site: Site) -> Iterator[ContentMatch]:
        """Find the content of a site's weight, block by block, from its first output feature to its last.

        Ends with one match for the rest where no tensor fits, or where tensors of several sizes do. It has no view, or
        all of those. A constant matches no tensor.
        """
        matrix, start = matrix_of(site), 0
        out, inner = matrix.shape
        while start < out:
            fitting = [size for size, wide in self.views_by_shape if wide == inner and size <= out - start]
            sizes = fitting if _is_matrix(site) else [out]
            candidates = {size: self._views_equal_to_block(site, matrix, start, size) for size in sizes}
            candidates = {size: views for size, views in candidates.items() if views}
            if len(candidates) != 1:
                yield ContentMatch(start, out, tuple(view for views in candidates.values() for view in views))
                return
            ((size, views),) = candidates.items()
            yield ContentMatch(start, start + size, tuple(views))
            start += size

    def _suits(self, view: BaseView, site: Site) -> bool:
        """Whether the view has the right rank. Only a linear layer's matrix can be a transpose."""
        shape = self.shapes[view.name]
        return len(shape) == 2 if _is_matrix(site) else shape == site.shape and not view.is_transposed

    def _views_equal_to_block(self, site: Site, matrix: Matrix, start: int, size: int) -> list[BaseView]:
        """The views that equal output features [start, start + size) of the matrix."""
        shape = (size, matrix.shape[1])
        if shape not in self.views_by_shape:
            return []
        rows, columns = _sample_positions(shape)
        sample = matrix.at((rows + start, columns))
        if (sample == sample[0]).all():
            return []  # constants, such as zeros or ones, are equal in unrelated tensors
        found: dict[str, BaseView] = {}
        for casts in _possible_casts(site, sample):
            for view in self._likely_views(shape, sample, casts):
                if view.name not in found and self._suits(view, site) and self._equals(matrix, start, view, casts):
                    found[view.name] = view
        return list(found.values())

    def _likely_views(self, shape: Shape, sample: NDArray[Any], casts: Casts) -> list[BaseView]:
        """The views of this shape whose sample fits."""
        if not casts:
            return [view for view in self.views_by_shape[shape] if self._sample_fits(sample, view, casts)]
        if (shape, casts) not in self.sample_tables:
            table = self.sample_tables[shape, casts] = {}
            for view in self.views_by_shape[shape]:
                table.setdefault(_bits(_cast(self._sample(view), casts)).tobytes(), []).append(view)
        return self.sample_tables[shape, casts].get(_bits(sample).tobytes(), [])

    def _sample_fits(self, sample: NDArray[Any], view: BaseView, casts: Casts) -> bool:
        """Whether the sample equals the view's after the casts, or is within quantisation error of it."""
        if casts:
            return bool(np.array_equal(_bits(sample), _bits(_cast(self._sample(view), casts))))
        return _relative_distance(sample, self._sample(view)) < MAX_QUANTISATION_ERROR

    def _equals(self, matrix: Matrix, start: int, view: BaseView, casts: Casts) -> bool:
        """Whether the rows of `matrix` from `start` on equal the view bit for bit, or within quantisation error.

        Compares along the rows in which `matrix` is stored, so that its file is read sequentially.
        """
        ours, theirs, offset = matrix, self._matrix(view), (start, 0)
        if ours.inner is not None:
            ours, theirs, offset = ours.inner, theirs.transposed, (0, start)
        squared_error = squared_norm = 0.0
        for rows, columns in _tiles(theirs):
            one = ours.tile(_shifted(rows, offset[0]), _shifted(columns, offset[1]))
            other = theirs.tile(rows, columns)
            if not casts:
                squared_error += float(np.square(one - other.astype(np.float32), dtype=np.float64).sum())
                squared_norm += float(np.square(other.astype(np.float32), dtype=np.float64).sum())
            elif not np.array_equal(_bits(one), _bits(_cast(other, casts))):
                return False
        return bool(casts) or squared_error < MAX_QUANTISATION_ERROR**2 * squared_norm

    def _matrix(self, view: BaseView) -> Matrix:
        matrix = self.matrices[view.name]
        return matrix.transposed if view.is_transposed else matrix

    def _sample(self, view: BaseView) -> NDArray[Any]:
        if view not in self.samples:
            matrix = self._matrix(view)
            self.samples[view] = matrix.at(_sample_positions(matrix.shape))
        return self.samples[view]


def _is_matrix(site: Site) -> bool:
    return site.is_linear and len(site.shape) == 2


@functools.cache
def _sample_positions(shape: Shape) -> Positions:
    count = math.prod(shape)
    random = np.random.default_rng(shape)
    chosen = np.arange(count) if count <= SAMPLE_SIZE else random.integers(0, count, SAMPLE_SIZE)
    rows, columns = np.divmod(np.sort(chosen), shape[1])
    return rows, columns


def _tiles(matrix: Matrix) -> Iterator[tuple[range, range]]:
    """Rows and columns to compare at once: whole rows, or squares of a transposed matrix.

    A narrow tile would be read in many small pieces. The first tile is small, because most differences show there.
    """
    rows, columns = matrix.shape
    count = max(1, TILE_BYTES // matrix.dtype.itemsize)
    width = min(columns, math.isqrt(count)) if matrix.inner is not None else columns
    starts = [0, 8, *range(max(9, count // width), rows, max(1, count // width))]
    for first, last in itertools.pairwise([*(start for start in starts if start < rows), rows]):
        for left in range(0, columns, width):
            yield range(first, last), range(left, min(left + width, columns))


def _shifted(part: range, by: int) -> range:
    return range(part.start + by, part.stop + by)


def _possible_casts(site: Site, sample: NDArray[Any]) -> Iterator[Casts]:
    """The casts that may have been applied: to the site's dtype, and perhaps to half precision before that."""
    if site.quantised is not None:
        yield ()
        return
    yield (sample.dtype,)
    for half in NUMPY_HALVES if sample.dtype.itemsize > 2 else ():
        if np.array_equal(_bits(_cast(sample, (half, sample.dtype))), _bits(sample)):
            yield (half, sample.dtype)


def _cast(array: NDArray[Any], casts: Casts) -> NDArray[Any]:
    with np.errstate(over="ignore"):  # the exporter's cast to float16 made infinities of the same numbers
        for dtype in casts:
            array = array.astype(dtype, copy=False)
    return array


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    """The bits of numbers as integers: NaN equals itself, and 0 differs from -0."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def _relative_distance(one: NDArray[Any], other: NDArray[Any]) -> float:
    """‖one − other‖ / ‖other‖, infinite where `other` is zero or not finite."""
    wide = other.astype(np.float64)
    norm = float(np.linalg.norm(wide))
    return float(np.linalg.norm(one - wide)) / norm if norm > 0 and math.isfinite(norm) else math.inf


def _endings(name: str) -> list[str]:
    """`a.b.weight` -> `b.weight`. The last part alone identifies no parameter."""
    return list(endings(name))[1:-1]
