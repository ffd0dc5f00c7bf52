"""The types of an adapter: one low-rank pair, and an adapter made of pairs.

Format readers resolve alpha, rank patterns and transposed files. Everywhere else a pair is (A, B, scale) in one
canonical shape, and its change of the weight is ΔW = scale * B @ A. With DoRA's magnitude m the weight is rescaled
too: W' = m / ‖W + ΔW‖ * (W + ΔW). The norm is that of each output, over all inputs and the kernel (Liu et al. 2024,
eq. 5).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused, brief, count, count_that_are
from lora_export.notebook import html_table

EVERY_ROW = slice(None)
TOGETHER = 0  # of `rows_together`

# Blocks of a low-rank product, see `multiply`.
SMALL = 1_000_000  # scalar multiplications up to which OpenBLAS calls a product small
LEAST_ROWS, ROWS_PER_KERNEL, LARGEST_RANK = 8, 4, 24
AVX512_NAMES = frozenset({"SkylakeX", "Cooperlake", "SapphireRapids"})  # OpenBLAS's names of processors with AVX-512


class ParameterEnding(str):
    """The ending of the name of a parameter that is the weight of no module, such as stacked experts."""

    __slots__ = ()


class Scaling(NamedTuple):
    """Each output of a layer times a factor, or each input."""

    factors: NDArray[np.float32]  # (out,) or (in,)
    of_inputs: bool


@dataclass(frozen=True, eq=False, repr=False)
class LoraPair:
    """A low-rank change of one weight, in fp32.

    `a` is (rank, in, ...) and `b` is (out, rank, 1...); the dots are the kernel of a convolution.
    `scale` is what the format meant by alpha and rank, as one finite number.
    `magnitude` (out,) is the length that DoRA gives each output of the changed weight, or None.
    `embedding` marks a table of embeddings: a linear layer of one-hot rows, where `in` is the number of rows and
    `out` their width. `as_stored` marks the pair of a bare parameter: its product has the shape in which the parameter
    is stored, whatever the layer that reads it.

    Raises InputRefused when shapes disagree, the rank is zero, or a value is not finite.
    """

    a: NDArray[np.float32]  # (rank, in, ...)
    b: NDArray[np.float32]  # (out, rank, 1...)
    scale: float
    magnitude: NDArray[np.float32] | None = None  # (out,)
    embedding: bool = False
    as_stored: bool = False
    needs_weight: ClassVar[bool] = False  # its change follows from the weight: see `pairs.transforms`
    is_structured: ClassVar[bool] = False  # A and B follow from fewer numbers: see `pairs.structured`
    is_made_whole: ClassVar[bool] = False  # its rows follow from what is computed once for all of them

    @property
    def kind(self) -> str:
        """The name of the method."""
        return "LoRA" if self.magnitude is None else "DoRA"

    def __post_init__(self) -> None:
        for name in ("a", "b", "magnitude"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, finite_fp32(name, value))
        if self.a.ndim < 2 or self.b.ndim < 2:
            raise InputRefused(f"A is {self.a.shape} and B is {self.b.shape}; both need at least two dimensions")
        if self.a.shape[0] != self.b.shape[1]:
            raise InputRefused(f"A and B have different ranks: A is {self.a.shape}, B is {self.b.shape}")
        if any(size != 1 for size in self.b.shape[2:]):
            raise InputRefused(f"B is {self.b.shape}; every dimension after (out, rank) must be 1, the kernel is in A")
        if 0 in self.a.shape or 0 in self.b.shape:
            raise InputRefused(f"a dimension is zero: A is {self.a.shape}, B is {self.b.shape}")
        if not math.isfinite(self.scale):
            raise InputRefused(f"the scale is {self.scale}; it must be finite")
        if self.magnitude is not None and self.magnitude.shape != (self.b.shape[0],):
            raise InputRefused(f"the magnitude is {self.magnitude.shape}, B is {self.b.shape}")
        if self.embedding and (self.a.ndim, self.b.ndim) != (2, 2):
            raise InputRefused(f"A is {self.a.shape} and B is {self.b.shape}; for an embedding both are matrices")

    def __repr__(self) -> str:
        dora = "" if self.magnitude is None else "DoRA"
        return brief(self, " x ".join(map(str, self.shape)), f"rank {self.rank}", f"scale {self.scale:g}", dora)

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def parameters(self) -> int:
        """The number of values that are stored for the pair."""
        return sum(each.size for each in (self.a, self.b, self.magnitude) if each is not None)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that the pair changes: (out, in, ...)."""
        return (self.b.shape[0], *self.a.shape[1:])

    @property
    def depends_on_weight(self) -> bool:
        """Whether the change follows from the weight and from other changes of it, as DoRA's does."""
        return self.needs_weight or self.magnitude is not None

    def scaling(self, strength: float = 1.0) -> Scaling | None:  # noqa: ARG002 - it is overridden
        """The change as factors of outputs or inputs, where it is nothing else."""
        return None

    @property
    def bias(self) -> LoraPair | None:
        """What changes the bias of the layer as it changes the weight."""
        return None

    @property
    def rows_together(self) -> int:
        """How many rows of a weight are changed together, from a multiple of that on; TOGETHER for all of them."""
        return 1

    @property
    def is_identity(self) -> bool:
        """Whether the pair changes nothing, as when training starts. False with a magnitude: the weight decides."""
        return self.magnitude is None and (self.scale == 0 or not self.a.any() or not self.b.any())

    @functools.cached_property
    def transposed(self) -> LoraPair:
        """The pair of the transposed weight, for weights that are stored (in, out). It has no magnitude."""
        return LoraPair(a=self.b.T, b=self.a.T, scale=self.scale)

    @property
    def turned(self) -> LoraPair:
        """The pair of the transpose of an expert; all else of it stays."""
        return replace(self, a=self.b.T, b=self.a.T)

    def of_layer(self, *, transposed: bool, embedding: bool) -> LoraPair:
        """A pair `as_stored`, as the pair of a layer that is stored so; any other pair itself."""
        if not self.as_stored:
            return self
        a, b = (self.b.T, self.a.T) if transposed else (self.a, self.b)
        return LoraPair(a=a, b=b, scale=self.scale, embedding=embedding)

    @property
    def norm(self) -> float:
        return norm_of_product(self.scale, self.a, self.b)

    @property
    def is_low_rank(self) -> bool:
        """Whether A and B have fewer entries than the weight. Only then is a branch of its own worth its cost."""
        out, *others = self.shape
        return self.rank * (out + math.prod(others)) < out * math.prod(others)

    def part(self, rows: NDArray[np.int64] | None, columns: NDArray[np.int64] | None) -> LoraPair:
        """The pair for these outputs and inputs of the weight; None stands for all of them, in their order."""
        return replace(
            self,
            a=self.a if columns is None else self.a[:, columns],
            b=self.b if rows is None else self.b[rows],
            magnitude=self.magnitude if rows is None or self.magnitude is None else self.magnitude[rows],
        )

    def times(self, weight: float) -> LoraPair:
        """The pair with this factor on its scale."""
        return replace(self, scale=weight * self.scale)

    def with_kernel(self, kernel: tuple[int, ...]) -> LoraPair:
        """The pair with its inputs split into channels and a kernel of this shape, () for those of a linear layer."""
        a = self.a.reshape(self.rank, -1, *kernel)
        return replace(self, a=a, b=self.b.reshape(*self.b.shape[:2], *[1] * len(kernel)))

    def for_weight(self, _shape: tuple[int, ...]) -> LoraPair:
        """The pair for a weight of this (out, in, ...) shape, where its file does not show all of the shape."""
        return self

    def delta(
        self, rows: slice = EVERY_ROW, *, strength: float = 1.0, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """`strength * scale * B @ A` for these output rows, shape (rows, in, ...), into `out` where that is given.

        One fp32 matrix product, then one fp32 multiplication by the scale, as in PEFT.
        """
        b = self.b[rows].reshape(-1, self.rank)
        shape = (b.shape[0], *self.a.shape[1:])
        product = np.empty(shape, np.float32) if out is None else out
        scale = np.float32(strength * self.scale)
        scale_product = not is_power_of_two(scale)
        # A power of two commutes with every rounding. Multiplying B, which is small, saves a pass over the product.
        multiply(b if scale_product else b * scale, self.a.reshape(self.rank, -1), product.reshape(shape[0], -1))
        if scale_product:
            product *= scale
        return product


def norm_of_product(scale: float, a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """‖scale * B A‖, without computing B A: ‖B A‖² = Σ (BᵀB) ∘ (AAᵀ), both (rank, rank)."""
    wide_a, wide_b = a.astype(np.float64).reshape(len(a), -1), b.astype(np.float64).reshape(-1, len(a))
    return abs(scale) * math.sqrt(max(0.0, float(np.sum((wide_b.T @ wide_b) * (wide_a @ wide_a.T)))))


def finite_fp32(name: str, value: NDArray[Any]) -> NDArray[np.float32]:
    """A read-only fp32 view; the array of the caller stays writable."""
    value = np.ascontiguousarray(value, dtype=np.float32).view()
    value.flags.writeable = False
    bad = value.size - np.count_nonzero(np.isfinite(value))
    if bad:
        raise InputRefused(f"{name.upper()} holds {count_that_are(bad, 'value')} not finite (NaN or infinity)")
    return value


@dataclass(frozen=True, eq=False, repr=False)
class TokenRows:
    """Rows of a table, such as the embeddings of some tokens, that were trained alone. They replace rows of the base.

    `tied` names further modules, by the end of their names, whose tables were trained as the same tensor.

    Raises InputRefused when an index is negative or occurs twice, shapes disagree, or a value is not finite.
    """

    indices: NDArray[np.int64]  # (rows,)
    values: NDArray[Any]  # (rows, width)
    tied: tuple[str, ...] = ()
    is_transposed: bool = False  # the table is stored as (width, rows)

    def __post_init__(self) -> None:
        object.__setattr__(self, "indices", np.array(self.indices, np.int64))
        if self.values.ndim != 2 or self.indices.shape != self.values.shape[:1]:
            raise InputRefused(f"there are {self.indices.size} row indices, and the values are {self.values.shape}")
        if (self.indices < 0).any() or len(np.unique(self.indices)) < self.indices.size:
            raise InputRefused(f"row indices must be different and not negative: {self.indices.tolist()}")
        bad = self.values.size - np.count_nonzero(np.isfinite(self.values.astype(np.float64)))
        if bad:
            raise InputRefused(f"the rows hold {count_that_are(bad, 'value')} not finite (NaN or infinity)")

    def __repr__(self) -> str:
        return brief(self, count(len(self.indices), "row"), f"width {self.values.shape[1]}")

    def equals(self, other: TokenRows | None) -> bool:
        """Whether they are the same rows with the same values."""
        return other is not None and all(
            map(np.array_equal, (self.indices, self.values), (other.indices, other.values))
        )

    @property
    def transposed(self) -> TokenRows:
        """The same rows, as columns of a table that is stored the other way."""
        return replace(self, is_transposed=not self.is_transposed)

    def write_into(self, table: NDArray[Any], first: int = 0) -> None:
        """Write what is in this part of the table as it is stored, which begins with the row `first`."""
        if self.is_transposed:
            table[:, self.indices] = self.values[:, first : first + len(table)].T.astype(table.dtype)
            return
        inside = (self.indices >= first) & (self.indices < first + len(table))
        table[self.indices[inside] - first] = self.values[inside].astype(table.dtype)


def is_weight_of(tensor: str, ending: str) -> bool:
    """Whether a tensor is the weight of a module whose name ends with these parts."""
    return f".{tensor}".endswith(f".{ending}.weight")


class ModuleEndings(tuple[str, ...]):
    """Endings of the names of modules, compared as PEFT compares `modules_to_save`: `norm` names `input_norm`, too."""

    @functools.cached_property
    def _by_length(self) -> list[tuple[int, set[str]]]:
        by_length: dict[int, set[str]] = {}
        for ending in self:
            by_length.setdefault(len(ending), set()).add(ending)
        return sorted(by_length.items())

    def module_around(self, tensor: str) -> str:
        """The outermost module around a tensor whose name ends so; empty where none does.

        Of many endings, each length costs as much as one.
        """
        for dot in re.finditer(r"\.", tensor) if self else ():
            end = dot.start()
            for length, endings in self._by_length:
                if length <= end and tensor[end - length : end] in endings:
                    return tensor[:end]
        return ""


def multiply(b: NDArray[np.float32], a: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """`b @ a`, (rows, rank) by (rank, columns), into `out`; a low rank in blocks of the size that suits OpenBLAS.

    With AVX-512, OpenBLAS multiplies small matrices without packing them first. In such blocks the product takes
    half of the time, or less, and has the same bits (measured with ranks from 2 to 24 and 768 to 14336 columns, rows
    of 2 MiB together, OpenBLAS 0.3.31 as SkylakeX on two Zen processors). OpenBLAS takes four rows at a time: blocks
    of 15 rows take 1.4 times as long as those of 12. All blocks of one height are one call, so that threads seldom
    wait for Python's lock. At rank 32 little is gained, and some bits differ. As Haswell, OpenBLAS always packs, and
    blocks take longer.
    """
    rank, columns = a.shape
    if rank > LARGEST_RANK or not _blocks_are_faster():
        np.matmul(b, a, out=out)
        return
    width = -(-columns // -(-columns * rank * LEAST_ROWS // SMALL))
    height = SMALL // (rank * width) // ROWS_PER_KERNEL * ROWS_PER_KERNEL
    count, rest = divmod(len(b), height)
    even = len(b) - rest
    blocks, products = b[:even].reshape(count, height, rank), out[:even].reshape(count, height, columns)
    for left in range(0, columns, width):
        part = slice(left, left + width)
        if count:
            np.matmul(blocks, a[:, part], out=products[..., part])
        if rest:
            np.matmul(b[even:], a[:, part], out=out[even:, part])


@functools.cache
def _blocks_are_faster() -> bool:
    from threadpoolctl import threadpool_info  # imported here: its import costs time, and few processes multiply

    return any(library.get("architecture") in AVX512_NAMES for library in threadpool_info())


def is_power_of_two(factor: float | np.float32) -> bool:
    """Whether a factor, of either sign, changes no digit of what it multiplies."""
    return abs(math.frexp(factor)[0]) == 0.5


def new_pair(
    shape: tuple[int, ...],
    *,
    rank: int,
    scale: float,
    rng: np.random.Generator,
    magnitude: NDArray[np.float32] | None = None,
    embedding: bool = False,
) -> LoraPair:
    """A new pair for a weight of this (out, in, ...) shape: A Kaiming-uniform with a = √5, B zero.

    Kaiming-uniform with negative slope √5 is U(-1/√in, 1/√in), where a kernel counts among the inputs (He et al. 2015,
    eq. 10, and the initialisation of Hu et al. 2021). For a table (rows, width) of an `embedding`, A is zero and B
    normal, as in Hu et al.'s own code and in PEFT. The pair is the identity, and so is one with the magnitude of the
    weight.
    """
    if embedding:
        rows, width = shape
        a, b = np.zeros((rank, rows), np.float32), rng.standard_normal((width, rank)).astype(np.float32)
    else:
        out_features, in_features, *kernel = shape
        bound = 1 / math.sqrt(in_features * math.prod(kernel))
        a = rng.uniform(-bound, bound, size=(rank, in_features, *kernel)).astype(np.float32)
        b = np.zeros((out_features, rank, *[1] * len(kernel)), np.float32)
    return LoraPair(a=a, b=b, scale=scale, magnitude=magnitude, embedding=embedding)


PerName = TypeVar("PerName")


class ExpertAxes(StrEnum):
    """How the product B A of one expert relates to the entries of that expert in its stacked parameter."""

    STORED = "stored"  # it has the shape in which the expert is stored
    TRANSPOSED = "transposed"  # its transpose has that shape
    BY_CLASS = "by class"  # PEFT from 0.19: STORED, or TRANSPOSED where the class of the experts sets `is_transposed`
    OUT_IN = "out_in"  # (out, in), however the expert is stored
    UNKNOWN = "unknown"


def expert_name(parameter: str, expert: int) -> str:
    """The name of one expert's part of a stacked parameter (experts, ., .)."""
    return f"{parameter}[{expert}]"


def split_part(name: str) -> tuple[str, str]:
    """The name of a tensor, and the indices of the part of it that is meant; these are empty for a whole tensor."""
    if not name.endswith("]"):  # nearly all, and there are many
        return name, ""
    tensor, bracket, indices = name.partition("[")
    return (tensor, indices[:-1]) if bracket else (name, "")


# The models of a diffusion pipeline that adapters change. What removes the noise is a UNet or a transformer.
DENOISER, SECOND_DENOISER = "denoiser", "denoiser_2"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
COMPONENTS = (DENOISER, SECOND_DENOISER, *TEXT_ENCODERS)


def component_name(component: str, name: str) -> str:
    """The name of a module or tensor in a component of a pipeline; the name itself without a component."""
    return f"{component}/{name}" if component else name


def split_component(name: str) -> tuple[str, str]:
    """The component of a name, and the name within it. The component is empty where the name has none."""
    component, slash, rest = name.partition("/")
    return (component, rest) if slash and component in COMPONENTS else ("", name)


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """Everything that one adapter file changes, in canonical shape. Read-only.

    Modules have the names of the adapter, without the wrapper prefixes of the trainer. The pair of one expert of a
    stacked parameter has the name that `expert_name` makes, and `as_stored`. In an adapter for several models of a
    pipeline, each name begins with its component (see `component_name`).
    """

    name: str
    format: str
    pairs: Mapping[str, LoraPair]  # module -> pair
    replaced: Mapping[str, NDArray[Any]] = field(default_factory=dict)  # tensor -> the whole tensor
    biases: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)  # module -> addition to its bias, scaled
    added: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)  # tensor -> addition to it, for vectors
    token_rows: Mapping[str, TokenRows] = field(default_factory=dict)  # tensor -> some of its rows
    layouts: Mapping[str, str] = field(default_factory=dict)  # module -> "out_in" or "in_out", where that is recorded
    experts: Mapping[str, ExpertAxes] = field(default_factory=dict)  # stacked parameter -> axes; absent: STORED
    tied: Mapping[str, str] = field(default_factory=dict)  # module -> the module of which it repeats pair and table
    # The endings of the names of modules, and ParameterEnding, that the trainer targeted; empty where not fully known.
    targets: tuple[str, ...] = ()
    # Of modules that the trainer saved with all tensors.
    saved_whole: ModuleEndings = field(default_factory=ModuleEndings)
    # Token ids: pairs act from the last occurrence of these on alone (aLoRA). Empty: on every token.
    invocation_tokens: tuple[int, ...] = ()
    flattened: bool = False  # whether `_` stands for the dots in the names of modules
    spelling: Mapping[str, str] = field(default_factory=dict)  # any name above -> the key in the file
    scale_source: str = ""  # where the scales come from, in words
    metadata: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # decisions of the reader that the user should know
    sha256: str = ""  # of its files, see `formats.adapter_files.hash_of_unchanged`
    file_sha256: str = ""  # of the file with its tensors alone, where it has others beside
    hub: Mapping[str, str] = field(default_factory=dict)  # repository and revision, of the Hugging Face Hub

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Mapping):
                object.__setattr__(self, name, MappingProxyType(dict(value)))

    def __repr__(self) -> str:
        whole = count(len(self.replaced), "whole tensor") if self.replaced else ""
        facts = self.format, count(len(self.pairs), "pair"), whole, f"{self.parameters:,} parameters"
        return brief(self, repr(self.name), *facts)

    def _repr_html_(self) -> str:
        shapes = {name: " x ".join(map(str, pair.shape)) for name, pair in self.pairs.items()}
        rows = [(name, shapes[name], pair.rank, pair.scale) for name, pair in self.pairs.items()]
        whole = [(name, " x ".join(map(str, tensor.shape)), "whole", "") for name, tensor in self.replaced.items()]
        return html_table(repr(self), ("module", "weight", "rank", "scale"), [*rows, *whole])

    @property
    def names(self) -> list[str]:
        """The names of all modules and vectors that get a change; not those of tensors that are replaced."""
        return [*self.pairs, *self.biases, *self.added]

    @property
    def every_name(self) -> list[str]:
        """The names of all modules and tensors that the adapter changes or replaces."""
        return [*self.pairs, *self.replaced, *self.biases, *self.added, *self.token_rows]

    def spelled(self, name: str) -> str:
        """The key that a module or tensor has in the file of the adapter. All experts of a parameter have one key."""
        return self.spelling.get(name, self.spelling.get(split_part(name)[0], name))

    def renamed(self, new_name: Callable[[str], str | None], **fields: Any) -> Adapter:
        """The adapter with other names of modules and tensors, and other `fields`. None as a name leaves it out."""

        def table(old: Mapping[str, PerName]) -> dict[str, PerName]:
            return {new: value for name, value in old.items() if (new := new_name(name)) is not None}

        tied = {new_name(head): new_name(module) for head, module in self.tied.items()}
        kinds = ("pairs", "replaced", "biases", "added", "token_rows", "layouts", "experts")
        fields |= {kind: table(getattr(self, kind)) for kind in kinds}
        return replace(
            self,
            tied={head: module for head, module in tied.items() if head is not None and module is not None},
            spelling=table(self.spelling) | table({name: self.spelled(name) for name in self.every_name}),
            **fields,
        )

    @property
    def beyond_pairs(self) -> dict[str, list[str]]:
        """The names of all that it has besides the plain pairs of layers, by the field that has it."""
        return {
            "magnitude": [module for module, pair in self.pairs.items() if pair.magnitude is not None],
            "transforms": [module for module, pair in self.pairs.items() if pair.needs_weight],
            "invocation_tokens": list(self.pairs) if self.invocation_tokens else [],
            "as_stored": [module for module, pair in self.pairs.items() if pair.as_stored],
            **{table: list(getattr(self, table)) for table in ("replaced", "biases", "added", "token_rows", "tied")},
        }

    def tied_to(self, module: str) -> list[str]:
        """The modules that repeat the pair of this one."""
        return [head for head, table in self.tied.items() if table == module]

    @property
    def is_identity(self) -> bool:
        """Whether merging the adapter would change nothing."""
        if self.replaced or self.token_rows:
            return False
        if any(change.any() for change in (*self.biases.values(), *self.added.values())):
            return False
        return all(pair.is_identity for pair in self.pairs.values())

    @property
    def parameters(self) -> int:
        """The number of trained values in the adapter."""
        low_rank = sum(pair.parameters for pair in self.pairs.values())
        vectors = (*self.biases.values(), *self.added.values())
        whole = sum(tensor.size for tensor in (*self.replaced.values(), *vectors))
        whole += sum(rows.values.size for rows in self.token_rows.values())
        return int(low_rank + whole)
