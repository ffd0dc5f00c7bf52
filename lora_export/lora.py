"""The nouns: one low-rank pair, and an adapter made of pairs.

Below the format readers nobody has heard of alpha, rank patterns or transposed files: a pair is
(A, B, scale) in one canonical shape, and its change of the weight is `scale * B @ A`. With DoRA's
magnitude m the weight is rescaled too: W' = m / ‖W + scale * B @ A‖ * (W + scale * B @ A), the norm
being that of each output, over everything that leads to it (Liu et al. 2024, eq. 5).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused

EVERY_ROW = slice(None)

# Products of low rank, see `multiply`.
SMALL = 1_000_000  # multiplications up to which OpenBLAS calls a product small
LEAST_ROWS, AT_ONCE, MOST_RANK = 8, 4, 24
PIECEMEAL = frozenset({"SkylakeX", "Cooperlake", "SapphireRapids"})  # what OpenBLAS calls processors with AVX-512


@dataclass(frozen=True, eq=False)
class LoraPair:
    """A low-rank change of one weight, in fp32.

    `a` is (rank, in, ...) and `b` is (out, rank, 1...); the dots are a convolution's kernel.
    `scale` is what the format meant by alpha and rank, as one finite number.
    `magnitude` (out,) is the length that DoRA gives each output of the changed weight, or None.
    `embedding` says that the weight is a table of embeddings: a linear layer of one-hot rows, `in` being
    the number of rows and `out` their width.

    Raises InputRefused when shapes disagree, the rank is zero, or a value is not finite.
    """

    a: NDArray[np.float32]  # (rank, in, ...)
    b: NDArray[np.float32]  # (out, rank, 1...)
    scale: float
    magnitude: NDArray[np.float32] | None = None  # (out,)
    embedding: bool = False

    def __post_init__(self) -> None:
        for side in ("a", "b", "magnitude"):
            value = getattr(self, side)
            if value is None:
                continue
            value = np.ascontiguousarray(value, dtype=np.float32).view()  # the caller's own array stays writable
            value.flags.writeable = False
            object.__setattr__(self, side, value)
            bad = value.size - np.count_nonzero(np.isfinite(value))
            if bad:
                raise InputRefused(f"{side.upper()} holds {bad} values that are not finite (NaN or infinity)")
        if self.a.ndim < 2 or self.b.ndim < 2:
            raise InputRefused(f"A is {self.a.shape} and B is {self.b.shape}; both need at least two dimensions")
        if self.a.shape[0] != self.b.shape[1]:
            raise InputRefused(f"the ranks disagree: A is {self.a.shape}, B is {self.b.shape}")
        if any(size != 1 for size in self.b.shape[2:]):
            raise InputRefused(f"B is {self.b.shape}; beyond (out, rank) it may only have ones: the kernel is A's")
        if 0 in self.a.shape or 0 in self.b.shape:
            raise InputRefused(f"a dimension is zero: A is {self.a.shape}, B is {self.b.shape}")
        if not math.isfinite(self.scale):
            raise InputRefused(f"the scale is {self.scale}")
        if self.magnitude is not None and self.magnitude.shape != (self.b.shape[0],):
            raise InputRefused(f"the magnitude is {self.magnitude.shape}, B is {self.b.shape}")
        if self.embedding and (self.a.ndim, self.b.ndim) != (2, 2):
            raise InputRefused(f"A is {self.a.shape} and B is {self.b.shape}; for an embedding both are matrices")

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that the pair changes: (out, in, ...)."""
        return (self.b.shape[0], *self.a.shape[1:])

    @property
    def is_identity(self) -> bool:
        """True where the pair changes nothing: the state in which training starts.

        Never so with a magnitude: whether it is the weight's own length, only the weight would tell.
        """
        return self.magnitude is None and (self.scale == 0 or not self.a.any() or not self.b.any())

    @functools.cached_property
    def transposed(self) -> LoraPair:
        """The pair of the transposed weight, for weights that are stored (in, out); what is added to it, alone."""
        return LoraPair(a=self.b.T, b=self.a.T, scale=self.scale)

    def delta(
        self, rows: slice = EVERY_ROW, *, strength: float = 1.0, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """`strength * scale * B @ A` for these output rows, shape (rows, in, ...), into `out` where that is given.

        One fp32 multiplication by the scale after one fp32 matrix product, the order PEFT uses.
        """
        b = self.b[rows].reshape(-1, self.rank)
        shape = (b.shape[0], *self.a.shape[1:])
        product = np.empty(shape, np.float32) if out is None else out
        scale = np.float32(strength * self.scale)
        late = not _is_power_of_two(scale)
        # A power of two commutes with every rounding: on B, which is small, it saves a pass over the product.
        multiply(b if late else b * scale, self.a.reshape(self.rank, -1), product.reshape(shape[0], -1))
        if late:
            product *= scale
        return product


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a table, such as some tokens' embeddings, that were trained by themselves and take the base's places.

    Raises InputRefused when an index is negative or named twice, shapes disagree, or a value is not finite.
    """

    indices: NDArray[np.int64]  # (rows,)
    values: NDArray[Any]  # (rows, width)

    def __post_init__(self) -> None:
        object.__setattr__(self, "indices", np.array(self.indices, np.int64))
        if self.values.ndim != 2 or self.indices.shape != self.values.shape[:1]:
            raise InputRefused(f"{self.indices.size} rows are named, the values are {self.values.shape}")
        if (self.indices < 0).any() or len(np.unique(self.indices)) < self.indices.size:
            raise InputRefused(f"rows must be different and not negative: {self.indices.tolist()}")
        bad = self.values.size - np.count_nonzero(np.isfinite(self.values.astype(np.float64)))
        if bad:
            raise InputRefused(f"the rows hold {bad} values that are not finite (NaN or infinity)")

    def put_into(self, table: NDArray[Any], first: int = 0) -> None:
        """Write the rows that lie in this part of the table, which begins with the row `first`."""
        here = (self.indices >= first) & (self.indices < first + len(table))
        table[self.indices[here] - first] = self.values[here].astype(table.dtype)


def multiply(b: NDArray[np.float32], a: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """`b @ a`, (rows, rank) by (rank, columns), into `out`; a low rank in the pieces that suit OpenBLAS best.

    Where it has AVX-512, it multiplies small matrices without packing them first. In such pieces the product takes
    half of the time, or less (measured with ranks from 2 to 24 and 768 to 14336 columns, blocks of 2 MiB, OpenBLAS
    0.3.31 as SkylakeX on two Zen processors), and has the same bits. It takes four rows at a time: pieces of 15 rows
    take 1.4 times as long as those of 12. One call for all pieces of a height, so that Python's lock is asked for
    seldom. At rank 32 little is gained, and some bits differ. As Haswell it has no such way, and pieces take longer.
    """
    rank, columns = a.shape
    if rank > MOST_RANK or not _likes_pieces():
        np.matmul(b, a, out=out)
        return
    width = -(-columns // -(-columns * rank * LEAST_ROWS // SMALL))
    height = SMALL // (rank * width) // AT_ONCE * AT_ONCE
    count, rest = divmod(len(b), height)
    even = len(b) - rest
    pieces, piled = b[:even].reshape(count, height, rank), out[:even].reshape(count, height, columns)
    for left in range(0, columns, width):
        part = slice(left, left + width)
        if count:
            np.matmul(pieces, a[:, part], out=piled[..., part])
        if rest:
            np.matmul(b[even:], a[:, part], out=out[even:, part])


@functools.cache
def _likes_pieces() -> bool:
    from threadpoolctl import threadpool_info  # not imported where nothing is multiplied

    return any(library.get("architecture") in PIECEMEAL for library in threadpool_info())


def _is_power_of_two(scale: np.float32) -> bool:
    return abs(math.frexp(scale)[0]) == 0.5


def fresh_pair(shape: tuple[int, int], *, rank: int, scale: float, rng: np.random.Generator) -> LoraPair:
    """A new pair for a weight of this (out, in) shape: A Kaiming-uniform with a = √5, B zero.

    Kaiming-uniform with negative slope √5 is U(-1/√in, 1/√in) (He et al. 2015, eq. 10, and the
    initialisation of Hu et al. 2021). With B zero the pair is the identity.
    """
    out_features, in_features = shape
    bound = 1 / math.sqrt(in_features)
    a = rng.uniform(-bound, bound, size=(rank, in_features)).astype(np.float32)
    return LoraPair(a=a, b=np.zeros((out_features, rank), np.float32), scale=scale)


@dataclass(frozen=True, eq=False)
class Adapter:
    """Everything one adapter file changes, in canonical shape. Read-only.

    Modules are named as in the adapter, without the trainer's wrapper prefixes.
    """

    name: str
    format: str
    pairs: Mapping[str, LoraPair]  # module -> pair
    replaced: Mapping[str, NDArray[Any]] = field(default_factory=dict)  # tensor -> the whole tensor
    biases: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)  # module -> addition to its bias, scaled
    rows: Mapping[str, Rows] = field(default_factory=dict)  # tensor -> rows of it
    targets: tuple[str, ...] = ()  # module name endings that the trainer targeted; empty where not fully known
    spelling: Mapping[str, str] = field(default_factory=dict)  # any name above -> the key in the file
    metadata: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what the reader decided and the user should know
    sha256: str = ""

    def __post_init__(self) -> None:
        for name in ("pairs", "replaced", "biases", "rows", "spelling", "metadata"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def spelled(self, name: str) -> str:
        """The key under which a module or tensor stands in the adapter's file."""
        return self.spelling.get(name, name)

    @property
    def is_identity(self) -> bool:
        """True where merging the adapter would change nothing."""
        shifted = any(change.any() for change in self.biases.values())
        if self.replaced or self.rows or shifted:
            return False
        return all(pair.is_identity for pair in self.pairs.values())

    @property
    def parameters(self) -> int:
        """How many numbers the adapter holds."""
        sides = ((pair.a, pair.b, pair.magnitude) for pair in self.pairs.values())
        low_rank = sum(side.size for pair in sides for side in pair if side is not None)
        whole = sum(tensor.size for tensor in (*self.replaced.values(), *self.biases.values()))
        whole += sum(rows.values.size for rows in self.rows.values())
        return int(low_rank + whole)


def sums_in(weight: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in which a weight and its change are summed: fp32, or fp64 for an fp64 weight."""
    return np.dtype(np.float64 if weight == np.float64 else np.float32)


def add(weight: NDArray[Any], change: NDArray[np.float32], dtype: np.dtype[Any] | None = None) -> NDArray[Any]:
    """`weight + change`, summed in fp32 (fp64 for an fp64 weight) and rounded once to `dtype` (the weight's own)."""
    merged: NDArray[Any] = np.empty(weight.shape, weight.dtype if dtype is None else dtype)
    add_into(merged, weight, change, np.empty(weight.shape, sums_in(weight.dtype)))
    return merged


def add_into(out: NDArray[Any], weight: NDArray[Any], change: NDArray[np.float32], total: NDArray[Any]) -> None:
    """As `add`, in memory that is there already: `total` receives the sum, `out` the sum rounded.

    They may be one and the same, where nothing is to be rounded. ml_dtypes converts: rounding to bf16 by integer
    arithmetic in place takes 1.2 times as long, in the best pieces that were tried, and widening by a shift 1.8 times.
    """
    if weight.dtype == total.dtype:
        np.add(weight, change, out=total)
    else:  # converted first: numpy, adding two dtypes, converts in small pieces, and slower
        np.copyto(total, weight)
        total += change
    if out is not total:
        np.copyto(out, total, casting="unsafe")


def energies(weight: NDArray[Any]) -> NDArray[np.float64]:
    """‖·‖² of each output of a weight in the (out, in, ...) view, summed in fp64."""
    flat = weight.reshape(len(weight), -1).astype(np.float64)
    squares: NDArray[np.float64] = np.einsum("oi,oi->o", flat, flat)
    return squares


def rescale(total: NDArray[Any], magnitude: NDArray[np.float32], squares: NDArray[np.float64]) -> None:
    """Give each output of W + ΔW, in the (out, in, ...) view, the length that DoRA wants, in place.

    `squares` are the outputs' energies. Raises InputRefused where an output is zero: it has no direction.
    """
    if not squares.all():
        count = squares.size - np.count_nonzero(squares)
        raise InputRefused(f"W + sBA is zero in {count} of its outputs, to which DoRA cannot give a length")
    factor = (magnitude / np.sqrt(squares)).astype(total.dtype)
    total *= factor.reshape(-1, *[1] * (total.ndim - 1))
