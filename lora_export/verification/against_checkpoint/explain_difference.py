"""What may have happened to a weight that differs from its sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_export.verification.against_checkpoint.changed_weight import ChangedWeight
from lora_export.verification.against_checkpoint.fp64_sums import (
    OTHER_LAYOUT,
    Fp64Sum,
    allowed_error,
    half_step,
    sum_in_other_layout,
)
from lora_export.verification.parity import Wide

CLOSE = 0.05  # ‖residual‖ / ‖difference from W‖ up to which other scales explain a difference
SCALE_TOLERANCE = 1e-3


def explain_difference(weight: ChangedWeight, right: Fp64Sum, detected: Mapping[str, bool], *, is_local: bool) -> str:
    """What may have happened; empty where nothing known explains it.

    `detected` names the deliberately wrong sums, and whether the candidate differs from each. `is_local`: only a few
    entries are off. Otherwise reads the weight once more.
    """
    if _is_in_other_layout(weight, right):
        layout = weight.step.spec.layout
        other = OTHER_LAYOUT[layout]
        return f"it is the sum with BA transposed, that of a weight stored {other}; this one is stored {layout}"
    for what, is_detected in detected.items():
        if not is_detected:  # the candidate is this wrong sum, to the last bit
            return "it is the sum with " + what
    if is_local:
        return "a few entries are damaged"
    fit, rounded_early = _ScaleFit(right), True
    for rows in weight.pieces:
        before, after = weight.before(rows), weight.after(rows)
        if not np.isfinite(after).all():
            return "some are not finite"
        rounded_early = rounded_early and _is_rounded_early(right, rows, before, after, weight.candidate.dtype)
        fit.add(rows, before, after)
    if rounded_early:
        return "the change seems to have been rounded before it was added"
    return fit.wrong_scales() if weight.step.magnitude is None else ""


def _is_in_other_layout(weight: ChangedWeight, right: Fp64Sum) -> bool:
    """Whether the candidate is the sum of a matrix that was read in the wrong layout."""
    other = sum_in_other_layout(right)
    if other is None:
        return False
    other, dtype = weight.with_norms(other), weight.candidate.dtype
    for rows in weight.pieces:
        value, bound = other.rows(rows, weight.before(rows))
        if not (np.abs(weight.after(rows) - value) <= allowed_error(value, bound, dtype)).all():
            return False
    return True


def _is_rounded_early(right: Fp64Sum, rows: slice, before: Wide, after: Wide, dtype: np.dtype[Any]) -> bool:
    """Whether one more rounding, of the change alone, accounts for all differences."""
    value, bound = right.rows(rows, before)
    of_change = 2 * half_step(np.abs(value - before), dtype)
    return bool((np.abs(after - value) <= allowed_error(value, bound, dtype) + of_change).all())


class _ScaleFit:
    """The scale of each term, by least squares over the pieces of a weight."""

    def __init__(self, right: Fp64Sum):
        count = len(right.factors)
        self.terms: Sequence[Fp64Sum] = [right.only_term(number) for number in range(count)]
        self.names = [term.adapter for term in right.step.terms] or ["the bias's change"]
        self.gram, self.products, self.square = np.zeros((count, count)), np.zeros(count), 0.0

    def add(self, rows: slice, before: Wide, after: Wide) -> None:
        changes = np.stack([(term.rows(rows, before)[0] - before).ravel() for term in self.terms])
        difference = (after - before).ravel()
        self.gram += changes @ changes.T
        self.products += changes @ difference
        self.square += float(difference @ difference)

    def wrong_scales(self) -> str:
        """The scales that are not 1; empty where other scales do not explain the candidate."""
        if not self.square:
            return ""
        factors = np.linalg.lstsq(self.gram, self.products, rcond=None)[0]
        residual = self.square - 2 * factors @ self.products + factors @ self.gram @ factors
        if residual > CLOSE**2 * self.square:
            return ""
        named = zip(self.names, factors, strict=True)
        wrong = [f"{name} x {factor:.3g}" for name, factor in named if abs(factor - 1) > SCALE_TOLERANCE]
        return f"its scale is off: {', '.join(wrong)}" if wrong else ""
