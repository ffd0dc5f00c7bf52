"""The types of a plan: the tensors of a base, and what happens to each of them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import brief, count, escaped_lines
from lora_export.lora import Adapter, LoraPair, Scaling, TokenRows
from lora_export.notebook import html_table
from lora_export.options.combining import Applied
from lora_export.plan.stored_region import StoredRegion

FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})


class Layout(StrEnum):
    """How a weight is stored. The holder of the weights states it; a shape alone cannot tell."""

    OUT_IN = "out_in"  # nn.Linear, and a convolution's (out, in, kernel)
    IN_OUT = "in_out"  # transformers' Conv1D, and a MatMul's second operand in a graph
    EMBEDDING = "embedding"  # nn.Embedding: one row per word; as a linear layer of one-hot inputs this is (in, out)
    MATRIX = "matrix"  # OUT_IN or EMBEDDING: only the adapter that was trained on it tells which
    UNKNOWN = "unknown"  # OUT_IN, IN_OUT or EMBEDDING: the base does not state it (see `layouts.py`)
    OTHER = "other"  # biases, norms, buffers: no pair fits them

    @property
    def is_transposed(self) -> bool:
        """Whether the weight is stored as the transpose of its (out, in) view."""
        return self in (Layout.IN_OUT, Layout.EMBEDDING)

    @property
    def is_matrix(self) -> bool:
        """Whether it is that of a linear layer or a convolution, stored (out, in, ...)."""
        return self in (Layout.OUT_IN, Layout.MATRIX, Layout.UNKNOWN)


class LayoutSource(StrEnum):
    """What decided the layout of a weight."""

    BASE = "base"  # the holder of the weights: the class of a module, the operator of a graph, the type of a model
    OPTION = "option"  # the user, by `layout`
    ADAPTER = "adapter"  # the adapter records how the weight that it was trained on is stored
    SHAPE = "shape"  # the weight is not square, and fits the adapter in one layout only
    SIBLINGS = "siblings"  # matrices of the same kind of name in the same file, which are not square
    NAME = "name"  # transformers and diffusers give this name to nn.Linear alone


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a base, from headers alone."""

    name: str
    shape: tuple[int, ...]  # as stored
    dtype: str  # NumPy's name, "bfloat16" included
    layout: Layout = Layout.OTHER
    file: str = ""  # within the checkpoint; empty where there are no files
    nbytes: int = 0
    layout_source: LayoutSource = LayoutSource.BASE
    aliases: tuple[str, ...] = ()  # other names of the same stored tensor: tied parameters
    region: StoredRegion | None = None  # where the tensor is a part of a stored one

    @property
    def stored_name(self) -> str:
        """The name of the stored tensor that this is, or is a part of."""
        return self.name if self.region is None else self.region.tensor

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS

    @property
    def matrix(self) -> tuple[int, ...]:
        """The shape in the (out, in, ...) view that pairs use."""
        return self.shape[::-1] if self.layout.is_transposed else self.shape


@dataclass(frozen=True, eq=False)
class Term:
    """One pair on one weight, at the strength that the user gave its adapter."""

    adapter: str
    module: str  # as the adapter spells it
    pair: LoraPair
    strength: float = 1.0
    rslora: bool = False  # whether the scale of the pair is alpha / √rank

    @property
    def scale(self) -> float:
        """The factor of B A: the strength times the scale of the pair."""
        return self.strength * self.pair.scale

    @property
    def factors(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """A (in, rank) and scale * B (rank, out) in fp32, as operands of matrix products.

        Those of a convolution are (rank, in, kernel) and (out, rank, 1...). Overflow gives infinities without a
        warning; the caller checks for them.
        """
        a, ones = self.pair.a, [1] * (self.pair.a.ndim - 2)
        with np.errstate(over="ignore"):
            b = self.pair.b.reshape(*self.pair.b.shape[:2], *ones) * np.float32(self.scale)
        return (a, b) if ones else (a.T, b.T)

    def __str__(self) -> str:
        if self.pair.needs_weight:
            return f"{self.scale:g} * change by {self.pair.kind} ({self.adapter})"
        text = f"{self.scale:g} * B A (rank {self.pair.rank}, {self.adapter})"
        text += ", on an embedding" if self.pair.embedding else ""
        return text if self.pair.magnitude is None else f"{text}, each output rescaled to DoRA's magnitude"


@dataclass(frozen=True, eq=False, repr=False)
class Step:
    """Everything that happens to one weight. `lora_export.sums` computes it.

    `replace` takes the place of the whole tensor, `token_rows` that of some of its rows. `terms` or `shift` are added.
    A term that depends on the weight, as one with DoRA's magnitude does, is the only term on its weight; in a plan of
    adapters that run one at a time, it is the only term of its adapter.
    """

    spec: TensorSpec
    terms: tuple[Term, ...] = ()
    shift: NDArray[np.float32] | None = None  # what is added to a bias
    replace: NDArray[Any] | None = None
    token_rows: TokenRows | None = None  # never with terms
    added: bool = False  # the base has no such tensor; `spec` describes the new one
    values_of: tuple[str, ...] = ()  # the adapters that `replace` and `token_rows` come from
    shift_of: tuple[str, ...] = ()  # those that `shift` comes from

    def __repr__(self) -> str:
        return brief(self, f"{self.weight}: {self}")

    @property
    def weight(self) -> str:
        """The name of the tensor in the base."""
        return self.spec.name

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that change the tensor."""
        return tuple(dict.fromkeys([*(term.adapter for term in self.terms), *self.values_of, *self.shift_of]))

    @property
    def magnitude(self) -> NDArray[np.float32] | None:
        """The length that DoRA gives each output of W + ΔW, (out,); None without DoRA."""
        return self.terms[0].pair.magnitude if self.terms else None

    @property
    def is_vector(self) -> bool:
        """Whether it changes a bias."""
        return len(self.spec.shape) == 1

    @property
    def scaling(self) -> Scaling | None:
        """The factors of outputs or inputs, where the only term is such a change."""
        return self.terms[0].pair.scaling(self.terms[0].strength) if self.terms else None

    @property
    def has_dora(self) -> bool:
        """Whether one of the adapters rescales the sum."""
        return any(term.pair.magnitude is not None for term in self.terms)

    @property
    def needs_weight(self) -> bool:
        """Whether the change follows from the weight: by the only term, see `pairs.transforms`."""
        return any(term.pair.needs_weight for term in self.terms)

    @property
    def depends_on_weight(self) -> bool:
        """Whether one of the adapters changes the weight by itself, as DoRA does too."""
        return any(term.pair.depends_on_weight for term in self.terms)

    @property
    def is_replacement(self) -> bool:
        """Whether other values take the place of the stored ones, and nothing is added."""
        return not self.terms and self.shift is None and self.has_own_values

    @property
    def has_own_values(self) -> bool:
        """Whether a whole tensor or rows take the place of stored values."""
        return self.replace is not None or self.token_rows is not None

    @property
    def replaces_only_rows(self) -> bool:
        """Whether the base keeps its other rows."""
        return self.token_rows is not None and self.replace is None

    @functools.cached_property
    def stored_terms(self) -> tuple[Term, ...]:
        """The terms, with pairs of the weight as it is stored."""
        if not self.spec.layout.is_transposed:
            return self.terms
        return tuple(replace(term, pair=term.pair.transposed) for term in self.terms)

    def for_adapter(self, adapter: str) -> Step | None:
        """The step with the terms of one adapter alone; None where it has none."""
        terms = tuple(term for term in self.terms if term.adapter == adapter)
        return replace(self, terms=terms) if terms else None

    def __str__(self) -> str:
        """What is done to the weight, in words."""
        if self.terms:
            terms = " + ".join(map(str, self.terms))
            return terms if self.replace is None else f"{terms}, added to the whole tensor from the adapter"
        if self.shift is not None:
            return "bias shifted" if self.replace is None else "bias replaced, then shifted"
        parts = [] if self.replaces_only_rows else ["added" if self.added else "replaced"]
        if self.token_rows is not None:
            parts.append(f"{count(self.token_rows.indices.size, 'row')} replaced")
        return ", then ".join(parts)


def are_same_change(one: Step, other: Step) -> bool:
    """Whether two steps do the same to two equal tensors, as these are stored. Not for what depends on the weight."""
    if one.depends_on_weight or other.depends_on_weight or len(one.terms) != len(other.terms):
        return False
    pairs = [(first.pair, second.pair) for first, second in zip(one.stored_terms, other.stored_terms, strict=True)]
    return (
        all(_equal(first.a, second.a) and _equal(first.b, second.b) for first, second in pairs)
        and all(first.scale == second.scale for first, second in zip(one.terms, other.terms, strict=True))
        and _equal(one.replace, other.replace)
        and _equal(one.shift, other.shift)
        and (
            one.token_rows is other.token_rows
            or (one.token_rows is not None and one.token_rows.equals(other.token_rows))
        )
    )


def _equal(one: NDArray[Any] | None, other: NDArray[Any] | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """What will be done to a base: pure, complete, and printable (`dry_run`)."""

    adapters: tuple[Adapter, ...]
    strengths: tuple[float, ...]
    steps: tuple[Step, ...]
    kept: tuple[str, ...]  # names of the tensors that no step changes
    notes: tuple[str, ...] = ()  # decisions that the user should know
    name_prefix: str = ""  # added to the name of every base tensor in the output, so that a new head finds its model
    spellings: tuple[str, ...] = ()  # of each adapter: how its names relate to the base's, see `spelling.Spelling`
    untied: Mapping[str, str] = field(default_factory=dict)  # new tensor -> the stored one whose values it starts from
    tied: str = Applied.tied  # what happens to tied tensors, see `ties.Tied`
    apart: frozenset[str] = frozenset()  # tied tensors that the base stores with other values, where that matters
    by_weight: Mapping[str, Step] = field(init=False, repr=False)
    by_part: Mapping[str, tuple[Step, ...]] = field(init=False, repr=False)  # stored tensor -> the steps on parts of it

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_weight", {step.weight: step for step in self.steps})
        parts: dict[str, tuple[Step, ...]] = {}
        for step in self.steps:
            if step.spec.region is not None:
                parts[step.spec.stored_name] = (*parts.get(step.spec.stored_name, ()), step)
        object.__setattr__(self, "by_part", parts)

    def __repr__(self) -> str:
        return brief(self, self._counts())

    def _repr_html_(self) -> str:
        rows = [(self.output_name(step), _described(step.spec), step) for step in self.steps]
        return html_table(self._counts(), ("weight", "stored as", "change"), rows)

    @property
    def low_rank(self) -> tuple[Step, ...]:
        """The steps that add a low-rank change."""
        return tuple(step for step in self.steps if step.terms)

    @property
    def replaced_weights(self) -> tuple[str, ...]:
        """The tensors that adapters replace, whole or in some rows."""
        return tuple(step.weight for step in self.steps if step.is_replacement)

    def steps_on(self, tensor: str) -> tuple[Step, ...]:
        """The step on a whole stored tensor, or those on parts of it."""
        return (self.by_weight[tensor],) if tensor in self.by_weight else self.by_part.get(tensor, ())

    def changes_tied(self, weight: str) -> bool:
        """Whether every adapter on this weight was trained on it as a tied tensor, so that all its names change."""
        tied = {adapter.name: set(adapter.tied.values()) for adapter in self.adapters}
        changes = [(term.adapter, term.module) for term in self.by_weight[weight].terms]
        wholes = [(each.name, weight.removesuffix(".weight")) for each in self.adapters if weight in each.replaced]
        changes = changes or wholes
        return bool(changes) and all(module in tied[adapter] for adapter, module in changes)

    def output_name(self, step_or_name: Step | str) -> str:
        """The name that a tensor has in the merged checkpoint."""
        if isinstance(step_or_name, Step):
            return step_or_name.weight if step_or_name.added else self.output_name(step_or_name.weight)
        return step_or_name if step_or_name in self.untied else self.name_prefix + step_or_name

    def __str__(self) -> str:
        lines = [self._counts(), *(f"note: {note}" for note in self.notes)]
        for step in self.steps:
            lines.append(f"  {self.output_name(step)}  [{_described(step.spec)}]  {step}")
        return escaped_lines(*lines)

    def _counts(self) -> str:
        kinds = Counter(map(_kind, self.steps))
        counts = [(kinds[one], one if kinds[one] == 1 else several) for one, several in STEP_KINDS]
        counts.append((len(self.kept), "kept as it is" if len(self.kept) == 1 else "kept as they are"))
        return ", ".join(f"{number} {what}" for number, what in counts if number)


def _described(spec: TensorSpec) -> str:
    """Shape and dtype; and the layout, where the base does not state it."""
    text = f"{' x '.join(map(str, spec.shape))} {spec.dtype}"
    return text if spec.layout_source is LayoutSource.BASE else f"{text}, {spec.layout} by {spec.layout_source}"


# For one and for several
STEP_KINDS = (
    ("weight changed", "weights changed"),
    ("bias changed", "biases changed"),
    ("tensor replaced", "tensors replaced"),
    ("table with some rows replaced", "tables with some rows replaced"),
    ("tensor added", "tensors added"),
)


def _kind(step: Step) -> str:
    if step.terms and len(step.spec.shape) > 1:
        return "weight changed"
    if step.terms or step.shift is not None:
        return "bias changed"
    if step.added:
        return "tensor added"
    return "table with some rows replaced" if step.replaces_only_rows else "tensor replaced"
