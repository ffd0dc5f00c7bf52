"""A tensor of the model as a candidate should have it: W, or W + s·BA where adapters were merged into it.

Either is right here: whether an adapter has its effect, the outputs show. What is looked for is what outputs can miss,
since no input reaches it, or hardly any: single rows, blocks, experts. So a number counts as wrong only if no other
sequence of sums and no other rounding explains it. The sums are those of `against_checkpoint`, which no merge uses.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lora_export.graph.content_match import NUMPY_HALVES
from lora_export.lora import EVERY_ROW, TokenRows
from lora_export.plan import Step, TensorSpec
from lora_export.plan.stored_region import StoredRegion
from lora_export.verification.against_checkpoint.changed_weight import ChangedWeight, WeightRows, compare_rows
from lora_export.verification.against_checkpoint.fp64_sums import FP32_ROUNDOFF, Fp64Sum, half_step
from lora_export.verification.against_checkpoint.stored_tensor import Scratch, pieces_of
from lora_export.verification.parity import Array, Wide

NEAR_IN_STEPS = 8.0  # half steps of the dtype, at the size of W and of the sum
SAMPLED_ROWS, SAMPLED_COLUMNS, SAMPLED_PARTS = 8, 16, 4
LARGEST_SAMPLE = 4096  # numbers that show in which dtype a tensor was rounded


class ArrayRows(NamedTuple):
    """A tensor in memory or in a mapped file, read in pieces; perhaps with rows that an adapter replaces."""

    array: Array
    token_rows: TokenRows | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def rows(self, rows: slice, scratch: Scratch | None = None, name: str = "") -> Array:  # noqa: ARG002 - StoredTensor
        part = np.ascontiguousarray(self.array[rows])  # a transpose is slow to compare in small blocks
        if self.token_rows is not None:
            part = part.copy()
            self.token_rows.write_into(part, rows.start)
        return part


class StoredForm(Enum):
    """What a candidate may have of a weight that a step changes."""

    SUM = "W + s·BA, where W may be replaced"
    REPLACED = "what replaces W, where A and B are kept beside it"
    BASE = "W"


class WrongNumbers(NamedTuple):
    """How many numbers of a tensor are neither W nor W + s·BA, in how many rows, and the first of these."""

    numbers: int = 0
    rows: int = 0
    first: int = -1

    def __add__(self, other: WrongNumbers) -> WrongNumbers:  # type: ignore[override]
        first = self.first if self.rows else other.first
        return WrongNumbers(self.numbers + other.numbers, self.rows + other.rows, first)


class _Terms(NamedTuple):
    """Numbers that are expected, those to which something was added, and the bound of the sum in fp32."""

    value: Wide
    before: Wide
    bound: Wide

    def allowed(self, dtype: np.dtype[Any]) -> Wide:
        """How far a candidate's number may be away, after roundings to `dtype`."""
        with np.errstate(over="ignore", invalid="ignore"):
            steps: Wide = NEAR_IN_STEPS * half_step(np.abs(self.value) + np.abs(self.before), dtype)
            return steps + self.bound * max(1.0, float(ml_dtypes.finfo(dtype).eps) / 2 / FP32_ROUNDOFF)

    def are_near(self, after: Array, dtype: np.dtype[Any], allowed: Wide | None = None) -> NDArray[np.bool_]:
        """Which numbers of a candidate these may be, after roundings to `dtype`; `allowed` where it is known."""
        with np.errstate(over="ignore", invalid="ignore"):
            wide = after.astype(np.float64)
            near = np.abs(wide - self.value) <= (self.allowed(dtype) if allowed is None else allowed)
            near |= (wide == self.value) | (np.isnan(wide) & np.isnan(self.value))
            near |= np.abs(self.value) > float(ml_dtypes.finfo(dtype).max)  # an infinity, or the largest number
        return near


@dataclass(frozen=True, eq=False)
class _Part:
    """A part of a tensor to which one step adds, or all of it. `spec` names it."""

    spec: TensorSpec
    step: Step | None = None

    @property
    def first_row(self) -> int:
        """Where it begins in the tensor."""
        return 0 if self.spec.region is None else self.spec.region.rows.start

    def of(self, array: Array) -> Array:
        """This part of an array in the shape of the tensor, as rows; a view where the array's layout allows it."""
        region = self.spec.region
        if region is not None:
            return _cut(array, region)
        return array.reshape(-1, array.shape[-1]) if array.ndim > 2 and self.step is None else np.atleast_1d(array)

    def weight(self, base: Array, candidate: Array, form: StoredForm) -> tuple[ChangedWeight, Fp64Sum]:
        """The part in both, and the sum that it should be: W + s·BA, or W."""
        base, candidate, rows = self.of(base), self.of(candidate), None
        step = Step(self.spec)
        if form is not StoredForm.BASE and self.step is not None:
            base, rows = base if self.step.replace is None else np.atleast_1d(self.step.replace), self.step.token_rows
            terms = self.step.terms if form is StoredForm.SUM else ()
            step = replace(self.step, replace=None, token_rows=None, terms=terms)
        pieces = list(pieces_of(candidate.shape))
        weight = ChangedWeight(step, ArrayRows(base, rows), ArrayRows(candidate), pieces)
        return weight, weight.with_norms(Fp64Sum.right(step))


def sum_in_fp64(step: Step, base: Array) -> Wide:
    """W + s·BA as the weight is stored, in fp64; what replaces W is in its place. No merge computes it so."""
    weight, right = _Part(step.spec, step).weight(base, base, StoredForm.SUM)
    return np.concatenate([right.rows(rows, weight.before(rows))[0] for rows in weight.pieces])


@dataclass(frozen=True, eq=False)
class ExpectedWeight:
    """A tensor of the model, and what adapters do to it or to parts of it."""

    spec: TensorSpec
    load: Callable[[], Array]  # W, in the model's own dtype
    steps: tuple[Step, ...] = ()
    _samples: dict[StoredForm, _Terms] = field(default_factory=dict, init=False, repr=False)

    @functools.cached_property
    def parts(self) -> tuple[_Part, ...]:
        return tuple(_Part(step.spec, step) for step in self.steps) or (_Part(self.spec),)

    @property
    def options(self) -> tuple[StoredForm, ...]:
        """What a candidate may have."""
        if not self.steps:
            return (StoredForm.BASE,)
        is_replaced = any(step.replace is not None and step.terms for step in self.steps)
        return (
            (StoredForm.SUM, StoredForm.REPLACED, StoredForm.BASE) if is_replaced else (StoredForm.SUM, StoredForm.BASE)
        )

    def agreement(self, candidate: Array, *, negated: bool = False) -> float:
        """The part of a sample in which a tensor of this shape agrees; zeros in both do not count. 0 for all zeros."""
        found = self._sampled(candidate)
        return max(self._agreement(-found if negated else found, each, candidate) for each in self.options)

    def _agreement(self, found: Array, form: StoredForm, candidate: Array) -> float:
        terms = self._sample(form)
        counts = (terms.value != 0) | (found != 0)
        near = terms.are_near(found, self._dtype(candidate))
        return float(np.count_nonzero(near & counts)) / max(1, int(np.count_nonzero(counts)))

    def ratios(self, candidate: Array) -> Iterator[Wide]:
        """The sample of a candidate relative to what it may be, (rows, columns)."""
        found = self._sampled(candidate).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            for form in self.options:
                yield (found / self._sample(form).value).reshape(-1, self._columns)

    @property
    def is_distinct(self) -> bool:
        """Whether its content identifies it: constants and masks are equal in unrelated tensors."""
        return len(np.unique(self._sample(StoredForm.BASE).value)) > SAMPLED_ROWS

    def wrong_in(self, candidate: Array, options: Sequence[StoredForm] = ()) -> WrongNumbers:
        """The wrong numbers of a tensor of this shape, over all of them. Reads both in blocks.

        `options` are what the candidate may have, where that is less than all of `self.options`.
        """
        base, found, dtype = self.load(), self._sampled(candidate), self._dtype(candidate)
        likely = sorted(options or self.options, key=lambda each: -self._agreement(found, each, candidate))
        total = WrongNumbers()
        for part in self.parts:
            wrong = WrongNumbers()
            for number, form in enumerate(likely):
                other = _wrong_in_part(*part.weight(base, candidate, form), dtype)
                wrong = other if number == 0 or other.numbers < wrong.numbers else wrong
                if not wrong.numbers:
                    break
            total += wrong._replace(first=wrong.first + part.first_row)
        if sum(math.prod(part.spec.shape) for part in self.parts) < math.prod(self.spec.shape):
            total += self._wrong_outside(base, candidate, dtype)
        return total

    def _wrong_outside(self, base: Array, candidate: Array, dtype: np.dtype[Any]) -> WrongNumbers:
        """The wrong numbers outside of the parts that steps change."""
        regions = [part.spec.region for part in self.parts if part.spec.region is not None]
        whole = StoredRegion(self.spec.name, regions[0].shape, slice(0, regions[0].shape[0]))
        part = _Part(replace(self.spec, region=whole))
        return _wrong_in_part(*part.weight(base, candidate, StoredForm.BASE), dtype, regions)

    # --- samples ---

    @property
    def _columns(self) -> int:
        return min(SAMPLED_COLUMNS, *(math.prod(part.of(self._shaped).shape[1:]) for part in self.parts))

    @functools.cached_property
    def _shaped(self) -> Array:
        """An array of the tensor's shape in no memory."""
        return np.broadcast_to(np.float32(0), self.spec.shape)

    @functools.cached_property
    def _places(self) -> list[tuple[_Part, list[tuple[int, NDArray[np.intp]]]]]:
        """Sampled parts -> rows, each with its columns."""
        random = np.random.default_rng(self.spec.shape)
        chosen = np.unique(np.linspace(0, len(self.parts) - 1, SAMPLED_PARTS).astype(int))
        places = []
        for part in (self.parts[number] for number in chosen):
            rows, *others = part.of(self._shaped).shape
            columns = random.choice(math.prod(others), self._columns, replace=False)
            own = random.choice(rows, min(rows, SAMPLED_ROWS), replace=False)
            places.append((part, [(int(row), columns) for row in own]))
        return places

    def _sampled(self, array: Array) -> Array:
        found = []
        for part, rows in self._places:
            own = part.of(array)
            found += [np.asarray(own[row]).reshape(-1)[columns] for row, columns in rows]
        return np.concatenate(found)

    def _sample(self, form: StoredForm) -> _Terms:
        """The expected numbers at the sampled places, with or without the step."""
        if form not in self._samples:
            base, found = self.load(), []
            for part, rows in self._places:
                weight, right = part.weight(base, base, form)
                for row, columns in rows:
                    one = slice(row, row + 1)
                    before = weight.before(one)
                    value, bound = right.rows(one, before)
                    found.append([each.reshape(-1)[columns] for each in (value, before, bound)])
            self._samples[form] = _Terms(*(np.concatenate(each) for each in zip(*found, strict=True)))
        return self._samples[form]

    def _dtype(self, candidate: Array) -> np.dtype[Any]:
        """The coarsest dtype to which the numbers of the model or of the candidate are rounded."""
        dtypes = [rounded_to(candidate), np.dtype(self.spec.dtype)]
        return max(dtypes, key=lambda dtype: float(ml_dtypes.finfo(dtype).eps))

    @property
    def sampling(self) -> Hashable:
        """Tensors for which it is equal are sampled at the same places."""
        parts = self if len(self.parts) > 1 or self.parts[0].spec.region is not None else None
        return self.spec.shape, self.spec.dtype, bool(self.steps), parts


class AlikeWeights:
    """Tensors of one `sampling`, with all of which a candidate is compared at once."""

    def __init__(self, weights: Sequence[ExpectedWeight]):
        self.weights = weights
        self._allowed: dict[np.dtype[Any], Wide] = {}

    def agreeing(self, candidate: Array, least: float) -> Iterator[ExpectedWeight]:
        """Those whose `agreement` with the candidate, of their shape, is at least `least`, in order."""
        found, dtype = self.weights[0]._sampled(candidate), self.weights[0]._dtype(candidate)
        if dtype not in self._allowed:
            self._allowed[dtype] = self._terms.allowed(dtype)
        counts = (self._terms.value != 0) | (found != 0)
        near = self._terms.are_near(found, dtype, self._allowed[dtype]) & counts
        agrees = near.sum(axis=1) >= least * np.maximum(1, counts.sum(axis=1))
        yield from (self.weights[number] for number in np.unique(self._owners[agrees]))

    @functools.cached_property
    def _owners(self) -> NDArray[np.intp]:
        """For each row of the samples, the number of its tensor."""
        return np.repeat(np.arange(len(self.weights)), [len(weight.options) for weight in self.weights])

    @functools.cached_property
    def _terms(self) -> _Terms:
        """The samples of all, (tensors and their forms, places)."""
        samples = [weight._sample(form) for weight in self.weights for form in weight.options]
        return _Terms(*(np.stack(each) for each in zip(*samples, strict=True)))


def _cut(array: Array, region: StoredRegion) -> Array:
    """A part of an array. An expert of a stack is cut out first: to flatten a transposed stack would copy it."""
    rows = region.rows
    if array.ndim == 3 and region.shape == (array.shape[0] * array.shape[1], array.shape[2]):
        expert, first = divmod(rows.start, array.shape[1])
        if first + rows.stop - rows.start <= array.shape[1]:
            array, rows = array[expert], slice(first, first + rows.stop - rows.start)
    array = array if array.shape[1:] == region.shape[1:] else array.reshape(region.shape)
    part = array[rows]
    return part if region.columns == EVERY_ROW else part[:, region.columns]


def _wrong_in_part(
    weight: ChangedWeight, right: Fp64Sum, dtype: np.dtype[Any], others: Sequence[StoredRegion] = ()
) -> WrongNumbers:
    """The wrong numbers of a part, without those in `others`."""
    scratch, total = Scratch(), WrongNumbers()
    for block in weight.blocks():
        if compare_rows(block, right, scratch).off:
            total += _wrong_in_block(block, right, dtype, others)
    return total


def _wrong_in_block(
    block: WeightRows, right: Fp64Sum, dtype: np.dtype[Any], others: Sequence[StoredRegion]
) -> WrongNumbers:
    with np.errstate(over="ignore", invalid="ignore"):
        value, bound = right.rows(block.rows, block.before)
    wrong = ~_Terms(value, block.before, bound).are_near(block.stored, dtype).reshape(len(value), -1)
    for region in others:
        first, last = (max(0, edge - block.rows.start) for edge in (region.rows.start, region.rows.stop))
        wrong[first:last, region.columns] = False
    rows = np.flatnonzero(wrong.any(axis=1))
    if not rows.size:
        return WrongNumbers()
    return WrongNumbers(int(np.count_nonzero(wrong)), int(rows.size), block.rows.start + int(rows[0]))


def rounded_to(array: Array) -> np.dtype[Any]:
    """The half precision that has a sample of the numbers, or the dtype of the array."""
    step = max(1, array.size // LARGEST_SAMPLE)
    array = array.T if array.flags.f_contiguous else array  # so that little of it is read
    sample = array.flat[::step] if array.flags.c_contiguous else array[:: max(1, len(array) // 4)]
    with np.errstate(over="ignore", invalid="ignore"):
        for half in NUMPY_HALVES if array.dtype.itemsize > 2 else ():
            if np.array_equal(np.asarray(sample).astype(half).astype(array.dtype), sample, equal_nan=True):
                return half
    return array.dtype
