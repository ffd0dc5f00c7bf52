"""W + s·BA in fp64, with the error bound of a sum in fp32. Shares no code with the merge and the pairs it judges."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lora_export.lora import LoraPair
from lora_export.pairs.computed import CirculantPair, FlatKroneckerPair, FourierPair, SparsePair
from lora_export.pairs.structured import KroneckerPair, StructuredPair, WholePair
from lora_export.plan import Layout, Step
from lora_export.verification.against_checkpoint.stored_tensor import Scratch
from lora_export.verification.parity import CONTROL_SCALE, Wide

Entries = NDArray[np.intp] | slice  # indices of flattened rows, or EVERY_ENTRY
ChangesOf = Callable[[slice], tuple[Wide, Wide]]  # stored rows -> T(W) - W and its size, each of these rows
BoundOf = Callable[[Entries], Wide]  # (flattened entries,) -> the bound of each, in one dimension
EVERY_ENTRY = slice(None)
_Matrix = NDArray[np.float32]
FP32_ROUNDOFF = 2.0**-24
TRANSFORM_OPERATIONS = 8  # beyond the rank, that a change which follows from the weight rounds

OTHER_LAYOUT = {Layout.OUT_IN: Layout.IN_OUT, Layout.IN_OUT: Layout.OUT_IN}


@dataclass(frozen=True, eq=False)
class Fp64Sum:
    """W and what a step adds to it, in fp64: as it should be, or with a deliberate error."""

    step: Step
    factors: tuple[float, ...]  # of each term, or of the shift; 1 where it is right
    transposed_term: int = -1  # the term whose BA is transposed
    with_magnitude: bool = True
    column_norms: tuple[Wide, Wide] | None = None  # of DoRA's outputs, and their bounds, where outputs are columns
    changes: ChangesOf | None = None  # what follows from the weight, of stored rows, see `changes_of_weight`
    _rights: dict[tuple[int, bool], Wide] = field(default_factory=dict, init=False, repr=False)
    _matrices: dict[int, tuple[_Matrix, _Matrix]] = field(default_factory=dict, init=False, repr=False)
    _wholes: dict[int, WholeChange | None] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def right(cls, step: Step) -> Fp64Sum:
        return cls(step, (1.0,) * max(len(step.terms), 1))

    @property
    def needs_column_norms(self) -> bool:
        return self.step.magnitude is not None and self.with_magnitude and self.step.spec.layout.is_transposed

    @property
    def needs_weight(self) -> bool:
        """Whether a change that follows from the weight is still missing."""
        return self.step.needs_weight and self.changes is None

    def rows(self, rows: slice, weight: Wide) -> tuple[Wide, Wide]:
        """These rows of the sum as they are stored, and how much a sum in fp32 may differ from each entry."""
        value, bound_of = self.values(rows, weight, Scratch())
        return value, bound_of(EVERY_ENTRY).reshape(value.shape)

    def values(self, rows: slice, weight: Wide, scratch: Scratch) -> tuple[Wide, BoundOf]:
        """These rows of the sum, and how much a sum in fp32 may differ from entries, given their flattened indices.

        Both are valid until `scratch` is used again.
        """
        total = self._added(rows, weight, scratch.array("sum", weight.shape))
        if self.step.magnitude is None or not self.with_magnitude:
            return total, lambda entries: self._bound(rows, total, entries)
        value, bound = self._rescaled(rows, total, self._bound(rows, total, EVERY_ENTRY).reshape(total.shape))
        return value, lambda entries: bound.reshape(-1)[entries]

    def _added(self, rows: slice, weight: Wide, out: Wide) -> Wide:
        """W and what is added to it, without DoRA's lengths."""
        step, flat, is_filled = self.step, out.reshape(len(out), -1), False
        for number, factor in enumerate(self.factors if step.terms else ()):
            if factor and step.needs_weight:
                assert self.changes is not None
                change = self.changes(rows)[0].reshape(out.shape)
                np.multiply(change, step.terms[0].strength * factor, out=out)
                is_filled = True
            elif factor:
                transposed = step.spec.layout.is_transposed != (number == self.transposed_term)
                scale, whole = step.terms[number].scale * factor, self._whole(number)
                if whole is not None:
                    part = scale * (whole.values.T if transposed else whole.values)[rows]
                    np.add(flat, part, out=flat) if is_filled else np.copyto(flat, part)
                else:
                    left, right = self._left(number, rows, transposed=transposed), self._right(number, transposed)
                    left = scale * left
                    if is_filled:
                        flat += left @ right
                    else:
                        np.matmul(left, right, out=flat)
                is_filled = True
        if step.shift is not None:
            np.multiply(self.factors[0], step.shift[rows], out=out)
        elif not is_filled:
            out[...] = 0
        out += weight
        return out

    def _bound(self, rows: slice, total: Wide, entries: Entries) -> Wide:
        """How much a sum in fp32 may differ from entries of W + Σ s·BA: no sum of |b| |a| is larger than ‖b‖ ‖a‖."""
        step, bound = self.step, 4 * np.abs(total.reshape(-1)[entries])
        if step.shift is not None:
            bound += np.abs(self.factors[0] * step.shift[rows].astype(np.float64)[entries])
        for number, factor in enumerate(self.factors if step.terms else ()):
            if factor and step.needs_weight:
                assert self.changes is not None
                size = self.changes(rows)[1].reshape(-1)[entries]
                bound += (step.terms[0].pair.rank + TRANSFORM_OPERATIONS) * abs(step.terms[0].strength * factor) * size
            elif factor:
                term, transposed = step.terms[number], step.spec.layout.is_transposed
                if (whole := self._whole(number)) is not None:
                    part = (whole.steps.T if transposed else whole.steps)[rows].reshape(-1)[entries]
                    bound += (4 + len(step.terms)) * abs(term.scale * factor) * part
                    continue
                left = np.linalg.norm(self._left(number, rows, transposed=transposed), axis=1)
                right = np.linalg.norm(self._right(number, transposed), axis=0)
                operations = (term.pair.rank + 4 + len(step.terms)) * abs(term.scale * factor)
                if isinstance(entries, slice):
                    bound += operations * np.outer(left, right).reshape(-1)
                else:
                    row, column = np.divmod(entries, len(right))
                    bound += operations * left[row] * right[column]
        return FP32_ROUNDOFF * bound

    def _left(self, number: int, rows: slice, *, transposed: bool) -> Wide:
        """The left factor of a term for these stored rows, (rows, rank); `transposed`: of the transposed product."""
        a, b = self._stored(number)
        return (a.T if transposed else b)[rows].astype(np.float64)

    def _right(self, number: int, transposed: bool) -> Wide:
        """The right factor of a term, (rank, columns)."""
        if (number, transposed) not in self._rights:
            a, b = self._stored(number)
            self._rights[number, transposed] = np.ascontiguousarray(b.T if transposed else a, np.float64)
        return self._rights[number, transposed]

    def _stored(self, number: int) -> tuple[_Matrix, _Matrix]:
        """A (rank, in) and B (out, rank) of a term; pairs that are stored in another form make them anew each time."""
        if number not in self._matrices:
            pair = self.step.terms[number].pair
            self._matrices[number] = pair.a.reshape(pair.rank, -1), pair.b.reshape(-1, pair.rank)
        return self._matrices[number]

    def _whole(self, number: int) -> WholeChange | None:
        if number not in self._wholes:
            self._wholes[number] = change_in_fp64(self.step.terms[number].pair)
        return self._wholes[number]

    def _rescaled(self, rows: slice, total: Wide, bound: Wide) -> tuple[Wide, Wide]:
        """The sum with DoRA's lengths."""
        step = self.step
        assert step.magnitude is not None
        is_transposed = step.spec.layout.is_transposed
        norms, norm_bounds = self.column_norms or (_row_norms(total), _row_norms(bound))
        magnitude = step.magnitude if is_transposed else step.magnitude[rows]
        factor, factor_bound = magnitude.astype(np.float64) / norms, norm_bounds / norms
        if not is_transposed:
            factor, factor_bound = (each.reshape(-1, *[1] * (total.ndim - 1)) for each in (factor, factor_bound))
        total *= factor
        return total, np.abs(factor) * bound + np.abs(total) * (factor_bound + 4 * FP32_ROUNDOFF)

    def without_magnitude(self) -> Fp64Sum:
        return replace(self, with_magnitude=False)

    def only_term(self, number: int) -> Fp64Sum:
        """W and one term alone, without DoRA's lengths."""
        factors = tuple(float(position == number) for position in range(len(self.factors)))
        return Fp64Sum(self.step, factors, with_magnitude=False, changes=self.changes)


def wrong_sums(right: Fp64Sum) -> Iterator[tuple[str, Fp64Sum]]:
    """The sums that the check must detect as wrong, by name."""
    step = right.step
    for number, factor in enumerate(right.factors):
        name = step.terms[number].adapter if step.terms else "the bias's change"
        before, after = right.factors[:number], right.factors[number + 1 :]
        changes = right.changes
        yield f"{name} left out", Fp64Sum(step, (*before, 0.0, *after), with_magnitude=False, changes=changes)
        yield f"{name} x {CONTROL_SCALE}", Fp64Sum(step, (*before, CONTROL_SCALE * factor, *after), changes=changes)
        if (
            step.terms
            and not step.needs_weight
            and len(step.terms[number].pair.shape) == 2
            and len(set(step.terms[number].pair.shape)) == 1
        ):
            yield f"{name} transposed", Fp64Sum(step, right.factors, transposed_term=number)


def sum_in_other_layout(right: Fp64Sum) -> Fp64Sum | None:
    """The sum of a square matrix that is read in the wrong layout: every BA transposed; None for other weights."""
    spec = right.step.spec
    layout, is_square = OTHER_LAYOUT.get(spec.layout), len(spec.shape) == 2 and spec.shape[0] == spec.shape[1]
    if layout is None or not is_square or not right.step.terms or right.step.needs_weight:
        return None
    return Fp64Sum(replace(right.step, spec=replace(spec, layout=layout)), right.factors)


def allowed_error(value: Wide, bound: Wide, dtype: np.dtype[Any]) -> Wide:
    """How much a stored number may differ from the true one: half a step of its dtype, and the bound of the sum."""
    return half_step(np.abs(value) + bound, dtype) + bound


def half_step(values: Wide, dtype: np.dtype[Any]) -> Wide:
    """Half the distance between neighbouring numbers of a dtype, at each value."""
    kind = ml_dtypes.finfo(dtype)
    _, exponents = np.frexp(np.maximum(values, float(kind.smallest_normal)))
    halves: Wide = np.ldexp(0.5, exponents - 1 - kind.nmant)
    return halves


def _row_norms(rows: Wide) -> Wide:
    norms: Wide = np.linalg.norm(rows.reshape(len(rows), -1), axis=1)
    return norms


# --- the change of a pair whose product is no plain B A, by the formula of its kind ---


class WholeChange(NamedTuple):
    """B A (out, inputs) of a pair, without its scale, and how far an entry in fp32 may be away, in steps of 2⁻²⁴."""

    values: Wide
    steps: Wide  # of the shape of values


def change_in_fp64(pair: LoraPair) -> WholeChange | None:
    """The change of a pair by its own formula; None where B A is its definition."""
    formula = FORMULAS.get(type(pair))
    if formula is None or not isinstance(pair, StructuredPair):
        return None
    values = np.asarray(formula(pair)).reshape(pair.shape_of_whole[0], -1)
    steps = np.broadcast_to(_steps_of_fourier(pair), values.shape) if isinstance(pair, FourierPair) else np.abs(values)
    for axis, chosen in enumerate((pair.rows, pair.columns)):
        if chosen is not None:
            values, steps = np.take(values, chosen, axis), np.take(steps, chosen, axis)
    return WholeChange(values, steps)


def _steps_of_fourier(pair: FourierPair) -> float:
    """No sum of the products of coefficients, cosines and sines is larger than the sum of the coefficients.

    A fast transform takes a few steps for each doubling of its size (Higham 2002, section 24.1).
    """
    out, inputs = pair.shape_of_whole
    operations = 4 * np.log2(out * inputs) + 4
    return float(operations * np.abs(pair.c.astype(np.float64)).sum() / (out * inputs))


def _kronecker(pair: Any) -> Wide:
    return np.kron(pair.w1.astype(np.float64), pair.w2.reshape(len(pair.w2), -1).astype(np.float64))


def _flat_kronecker(pair: Any) -> Wide:
    return np.kron(pair.w1.astype(np.float64)[None], pair.w2.astype(np.float64))


def _whole(pair: Any) -> Wide:
    return np.asarray(pair.change, np.float64)


def _sparse(pair: Any) -> Wide:
    values = np.zeros(pair.shape_of_whole)
    np.add.at(values, tuple(pair.settings["places"]), pair.v.astype(np.float64))
    return values


def _circulant(pair: Any) -> Wide:
    """Line k of a block is its kernel, moved on by k."""
    lines = [np.roll(pair.w.astype(np.float64), line, axis=2) for line in range(pair.w.shape[2])]
    return np.stack(lines, axis=1).reshape(pair.shape_of_whole)


def _fourier(pair: Any) -> Wide:
    spectrum = np.zeros(pair.shape_of_whole)
    spectrum[tuple(pair.settings["frequencies"])] = pair.c
    return np.fft.ifft2(spectrum).real


FORMULAS: dict[type[LoraPair], Callable[[Any], Wide]] = {
    KroneckerPair: _kronecker,
    FlatKroneckerPair: _flat_kronecker,
    WholePair: _whole,
    SparsePair: _sparse,
    CirculantPair: _circulant,
    FourierPair: _fourier,
}
