"""W + BA of rows of a weight, rounded once and measured, in one pass over the weight (merge_rows.c, merge_blocks.c).

`INSTRUCTIONS` names the instruction set in use; it is empty on a processor that has none of them, and `merge_rows` is
not to be called then.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

__version__ = "0.2.0"

TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(ml_dtypes.bfloat16): 2}  # `enum Type` in C
# The library of each instruction set, the fastest first -> what NumPy calls the set, before 2.4 and since
FEATURES = {"v4": ({"AVX512_SKX"}, {"X86_V4"}), "v3": ({"AVX2", "FMA3", "F16C"}, {"X86_V3"})}


class _Job(ctypes.Structure):
    """`Job` in C."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "columns", "rank")),
        *((name, ctypes.c_void_p) for name in ("weight", "output", "b", "a", "factors", "norms", "figures")),
        *((name, ctypes.c_int64) for name in ("weight_stride", "output_stride")),
        *((name, ctypes.c_int32) for name in ("weight_type", "output_type")),
    )


FIGURES = 5  # the sums of `merge_rows`
PLANES = 2  # of a code, at most
TILE_BYTES = 4 * 256 * (4 + 4 + 1)  # `Tile` in C
# The width, the bits, and the bits below it of each plane that `EACH_PLANE` in C has
FORMS = {(16, 4, 0), (32, 4, 0), (64, 4, 0), (32, 2, 0), (32, 2, 4), (32, 1, 2), (32, 1, 4), (1, 1, 4)}


class _Plane(ctypes.Structure):
    """`Plane` in C."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("start", "chunks", "width", "bits"))


class _BlockJob(ctypes.Structure):
    """`BlockJob` in C."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "columns", "rank")),
        *((name, ctypes.c_void_p) for name in ("tile", "blocks", "output", "steps", "offsets", "b", "a", "figures")),
        *((name, ctypes.c_int64) for name in ("elements", "bytes", "group", "first", "count", "planes")),
        ("plane", _Plane * PLANES),
    )


class Planes(NamedTuple):
    """How codes are stored in a block of ggml: (start, chunks, width, bits) of each plane, the lowest bits first."""

    planes: Sequence[tuple[int, int, int, int]]
    first: int  # the number of code 0; the others follow by ones
    count: int  # of codes

    @property
    def are_known(self) -> bool:
        """Whether `merge_blocks` has code for them on this processor."""
        below = itertools.accumulate((bits for *_, bits in self.planes), initial=0)
        forms = [(*own[2:], lower) for own, lower in zip(self.planes, below, strict=False)]
        has_code = all(form in FORMS or form == (32, 8, 0) for form in forms)
        return bool(INSTRUCTIONS) and len(self.planes) <= PLANES and has_code

    def fit(self, elements: int, nbytes: int) -> bool:
        """Whether they have so many codes, in blocks of so many bytes."""
        return all(
            chunks * width * 8 == elements * bits and 0 <= start <= nbytes - chunks * width
            for start, chunks, width, bits in self.planes
        )


def _instructions() -> str:
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "neon"
    found = np.show_config(mode="dicts")["SIMD Extensions"]  # type: ignore[index]
    has = {*found["baseline"], *found["found"]}
    return next((name for name, sets in FEATURES.items() if any(one <= has for one in sets)), "")


INSTRUCTIONS = _instructions()


@functools.cache
def _library() -> ctypes.CDLL:
    (path,) = Path(__file__).parent.glob(f"merge_rows_{INSTRUCTIONS}.*")
    library = ctypes.CDLL(str(path))
    library.merge_rows.argtypes, library.merge_rows.restype = [ctypes.POINTER(_Job)], ctypes.c_int32
    library.merge_blocks.argtypes, library.merge_blocks.restype = [ctypes.POINTER(_BlockJob)], ctypes.c_int32
    return library


def takes(weight: NDArray[Any], output: NDArray[Any]) -> bool:
    """Whether `merge_rows` takes such arrays: matrices of its types, whose rows are contiguous."""
    return bool(INSTRUCTIONS) and all(
        one.ndim == 2 and one.dtype in TYPES and one.strides[1] == one.itemsize and not one.strides[0] % one.itemsize
        for one in (weight, output)
    )


def merge_rows(
    weight: NDArray[Any],
    output: NDArray[Any],
    b: NDArray[np.float32],
    a: NDArray[np.float32],
    *,
    factors: NDArray[np.float32] | None = None,
    figures: NDArray[np.float64] | None = None,
) -> bool:
    """Fill `output` (rows, columns) with (weight + b @ a) * factors, in fp32, rounded once. See `takes`.

    `b` is (rows, rank), `a` (rank, columns), `factors` (rows,). To `figures` (5,) are added the sums of W², of D²,
    of (W' - W) D, of (W' - W - D)², and the number of entries where W' is not W: D is the change, W' what is stored.
    Returns whether every sum is finite, and every number that is stored. Raises ValueError for arrays that do not fit
    each other.
    """
    return not _run(weight, output, b, a, factors=factors, figures=figures)


def merge_blocks(
    blocks: NDArray[np.uint8],
    output: NDArray[np.uint8],
    steps: NDArray[np.float32],
    offsets: NDArray[np.float32],
    b: NDArray[np.float32],
    a: NDArray[np.float32],
    stored: Planes,
    *,
    figures: NDArray[np.float64] | None = None,
) -> bool:
    """Fill `output` with the codes nearest to W + b @ a on the steps and offsets of the blocks, which stay.

    `blocks` and `output` are (rows, blocks, bytes), `steps` and `offsets` (rows, blocks, groups), all finite. `b` and
    `figures` are those of `merge_rows`, `a` is (rank, columns). Returns whether every sum is finite. Raises ValueError
    for arrays that do not fit each other.
    """
    rows, count, groups = steps.shape
    columns, nbytes = a.shape[1], blocks.shape[2]
    _require_types(np.uint8, blocks, output)
    _require_types(np.float32, steps, offsets, b, a)
    _require_vector("figures", figures, np.float64, FIGURES)
    _require(all(one.flags.c_contiguous for one in (blocks, output, steps, offsets, b, a)), "an array has gaps")
    _require(blocks.shape == output.shape == (rows, count, nbytes), "the output is not like the blocks")
    _require(offsets.shape == steps.shape and b.shape == (rows, len(a)), "steps, offsets or B have other rows")
    elements = columns // max(1, count)
    _require(columns in (32 * count, 256 * count), "A has other columns than the blocks")
    _require(groups in (elements // 16, elements // 32), "the blocks have other groups than the steps")
    _require(stored.are_known and stored.fit(elements, nbytes), "the planes are not those of the blocks")
    np.copyto(output, blocks)
    planes, tile = [_Plane(*plane) for plane in stored.planes], np.empty(TILE_BYTES + 64, np.uint8)
    job = _BlockJob(
        *(rows, columns, len(a), -(-tile.ctypes.data // 64) * 64),
        *(one.ctypes.data for one in (blocks, output, steps, offsets, b, a)),
        figures=None if figures is None else figures.ctypes.data,
        elements=elements,
        bytes=nbytes,
        group=elements // groups,
        first=stored.first,
        count=stored.count,
        planes=len(planes),
        plane=(_Plane * PLANES)(*planes),
    )
    return not _library().merge_blocks(ctypes.byref(job))


def _require(is_right: bool, what: str) -> None:
    """Raise ValueError where C would read or write beyond an array."""
    if not is_right:
        raise ValueError(f"arrays do not fit each other: {what}")


def _require_types(dtype: type[np.generic], *arrays: NDArray[Any]) -> None:
    _require(all(one.dtype == dtype for one in arrays), f"one is not of {dtype.__name__}")


def _require_vector(name: str, array: NDArray[Any] | None, dtype: type[np.generic], count: int) -> None:
    if array is not None:
        is_right = array.shape == (count,) and array.dtype == dtype and array.flags.c_contiguous
        _require(is_right, f"{name} are not {count} of {dtype.__name__} without gaps")


def squared_norms(weight: NDArray[Any], b: NDArray[np.float32], a: NDArray[np.float32]) -> NDArray[np.float64]:
    """The squared norm of each row of weight + b @ a, (rows,)."""
    norms = np.zeros(len(weight))
    _run(weight, None, b, a, norms=norms)
    return norms


def _run(
    weight: NDArray[Any],
    output: NDArray[Any] | None,
    b: NDArray[np.float32],
    a: NDArray[np.float32],
    *,
    factors: NDArray[np.float32] | None = None,
    norms: NDArray[np.float64] | None = None,
    figures: NDArray[np.float64] | None = None,
) -> int:
    target = weight if output is None else output
    _require(takes(weight, target), "the weight or the output has gaps in its rows, or another type")
    _require_types(np.float32, a, b)
    _require(b.flags.c_contiguous and a.flags.c_contiguous, "A or B has gaps")
    rows, columns = weight.shape
    _require(b.shape == (rows, len(a)) and a.shape == (len(a), columns), "A and B are not those of the weight")
    _require(target.shape == weight.shape, "the output is not like the weight")
    _require_vector("factors", factors, np.float32, rows)
    _require_vector("norms", norms, np.float64, rows)
    _require_vector("figures", figures, np.float64, FIGURES)
    others = {"output": output, "factors": factors, "norms": norms, "figures": figures}
    job = _Job(
        *(rows, columns, len(a)),
        weight_stride=weight.strides[0] // weight.itemsize,
        output_stride=target.strides[0] // target.itemsize,
        weight_type=TYPES[weight.dtype],
        output_type=TYPES[target.dtype],
        **{name: array.ctypes.data for name, array in others.items() if array is not None},
        weight=weight.ctypes.data,
        b=b.ctypes.data,
        a=a.ctypes.data,
    )
    return int(_library().merge_rows(ctypes.byref(job)))
