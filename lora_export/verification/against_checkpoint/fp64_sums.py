"""W + s·BA in fp64, with the error bound of a sum in fp32. Shares no code with the merge that it judges."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from lora_export.lora import LoraPair
from lora_export.plan import Layout, Step
from lora_export.verification.parity import CONTROL_SCALE, Wide

FP32_ROUNDOFF = 2.0**-24

OTHER_LAYOUT = {Layout.OUT_IN: Layout.IN_OUT, Layout.IN_OUT: Layout.OUT_IN}


@dataclass(frozen=True, eq=False)
class Fp64Sum:
    """W and what a step adds to it, in fp64: as it should be, or with a deliberate error."""

    step: Step
    factors: tuple[float, ...]  # of each term, or of the shift; 1 where it is right
    transposed_term: int = -1  # the term whose BA is transposed
    with_magnitude: bool = True
    column_norms: tuple[Wide, Wide] | None = None  # of DoRA's outputs, and their bounds, where outputs are columns

    @classmethod
    def right(cls, step: Step) -> Fp64Sum:
        return cls(step, (1.0,) * max(len(step.terms), 1))

    @property
    def needs_column_norms(self) -> bool:
        return self.step.magnitude is not None and self.with_magnitude and self.step.spec.layout.is_transposed

    def rows(self, rows: slice, weight: Wide) -> tuple[Wide, Wide]:
        """These rows of the sum as they are stored, and how much a sum in fp32 may differ from each entry."""
        total, bound = self._added(rows, weight)
        if self.step.magnitude is None or not self.with_magnitude:
            return total, bound
        return self._rescaled(rows, total, bound)

    def _added(self, rows: slice, weight: Wide) -> tuple[Wide, Wide]:
        step, total, bound = self.step, weight.copy(), np.zeros_like(weight)
        is_transposed = step.spec.layout.is_transposed
        for number, (term, factor) in enumerate(zip(step.terms, self.factors, strict=step.shift is None)):
            if factor:
                scale = term.scale * factor
                transposed = is_transposed != (number == self.transposed_term)
                total += scale * _product(term.pair, rows, transposed=transposed)
                operations = term.pair.rank + 4 + len(step.terms)
                bound += operations * abs(scale) * _norms(term.pair, rows, transposed=is_transposed)
        if step.shift is not None:
            shift = self.factors[0] * step.shift[rows].astype(np.float64)
            total += shift
            bound += np.abs(shift)
        return total, FP32_ROUNDOFF * (bound + 4 * np.abs(total))

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
        return Fp64Sum(self.step, factors, with_magnitude=False)


def wrong_sums(right: Fp64Sum) -> Iterator[tuple[str, Fp64Sum]]:
    """The sums that the check must detect as wrong, by name."""
    step = right.step
    for number, factor in enumerate(right.factors):
        name = step.terms[number].adapter if step.terms else "the bias's change"
        before, after = right.factors[:number], right.factors[number + 1 :]
        yield f"{name} left out", Fp64Sum(step, (*before, 0.0, *after), with_magnitude=False)
        yield f"{name} x {CONTROL_SCALE}", Fp64Sum(step, (*before, CONTROL_SCALE * factor, *after))
        if step.terms and step.terms[number].pair.a.ndim == 2 and len(set(step.terms[number].pair.shape)) == 1:
            yield f"{name} transposed", Fp64Sum(step, right.factors, transposed_term=number)


def sum_in_other_layout(right: Fp64Sum) -> Fp64Sum | None:
    """The sum of a square matrix that is read in the wrong layout: every BA transposed; None for other weights."""
    spec = right.step.spec
    layout, is_square = OTHER_LAYOUT.get(spec.layout), len(spec.shape) == 2 and spec.shape[0] == spec.shape[1]
    if layout is None or not is_square or not right.step.terms:
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


def _product(pair: LoraPair, rows: slice, *, transposed: bool) -> Wide:
    """BA of these rows of the weight as it is stored; `transposed` where that is (in, out)."""
    left, right = _factors(pair, rows, transposed=transposed)
    product: Wide = left @ right
    return product if transposed else product.reshape(-1, *pair.a.shape[1:])


def _norms(pair: LoraPair, rows: slice, *, transposed: bool) -> Wide:
    """‖b‖ ‖a‖ for each entry: no sum of |b| |a| is larger."""
    left, right = _factors(pair, rows, transposed=transposed)
    products: Wide = np.outer(np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=0))
    return products if transposed else products.reshape(-1, *pair.a.shape[1:])


def _factors(pair: LoraPair, rows: slice, *, transposed: bool) -> tuple[Wide, Wide]:
    """The factors of these stored rows: (rows, rank), (rank, columns)."""
    a, b = pair.a.reshape(pair.rank, -1), pair.b.reshape(-1, pair.rank)
    left, right = (a.T[rows], b.T) if transposed else (b[rows], a)
    return left.astype(np.float64), right.astype(np.float64)


def _row_norms(rows: Wide) -> Wide:
    norms: Wide = np.linalg.norm(rows.reshape(len(rows), -1), axis=1)
    return norms
