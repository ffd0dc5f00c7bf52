"""A weight to which adapters add: every entry against W + s·BA in fp64, and against sums that are wrong on purpose."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lora_export.options.spelling import named
from lora_export.plan import Step
from lora_export.verification.against_checkpoint.changed_weight import (
    CalibratedLayer,
    ChangedWeight,
    ChosenNumbers,
    ComparedRows,
    WeightRows,
    compare_rows,
)
from lora_export.verification.against_checkpoint.fp64_sums import (
    OTHER_LAYOUT,
    Fp64Sum,
    allowed_error,
    half_step,
    sum_in_other_layout,
    wrong_sums,
)
from lora_export.verification.against_checkpoint.result import AuditedWeight, Fate
from lora_export.verification.against_checkpoint.stored_tensor import Scratch, StoredTensor
from lora_export.verification.parity import Outcome, Wide, WorstElement

RIGHT = "W + s·BA"  # beside the names of the controls
NOT_WORSE = 1.01  # times the error of the nearest numbers: the model's run is not repeated to the last bit


def judge_changed(
    name: str, step: Step, base: StoredTensor, candidate: StoredTensor, calibrated: CalibratedLayer | None = None
) -> AuditedWeight:
    """Compare a changed weight with its sum in fp64, and with the controls."""
    return judge_weight(name, ChangedWeight(step, base, candidate, list(candidate.pieces()), calibrated))


def judge_weight(name: str, weight: ChangedWeight) -> AuditedWeight:
    """As `judge_changed`, however the weight is stored."""
    step = weight.step
    right = weight.with_norms(Fp64Sum.right(step))
    controls = {what: _Control(weight.with_norms(wrong)) for what, wrong in wrong_sums(right)}
    found = _Differences()
    chosen = None if weight.calibrated is None else weight.calibrated.numbers(step.spec.layout)
    scratch, others = Scratch(), Scratch()
    for block in weight.blocks():
        compared = compare_rows(block, right, scratch, every_entry=not found.elements)
        found.add(block, compared, scratch)
        if chosen is not None and block.gaps is not None:
            chosen.add(RIGHT, compared.difference, block.gaps, compared.value - block.before)
        for what, control in controls.items():
            control.compare(block, compared.value, others, what, chosen)
    if chosen is not None:
        for what, control in controls.items():
            control.detected = control.detected or not chosen.fits(what)
    result = found.result(name, {what: one.detected for what, one in controls.items() if one.is_wrong})
    if chosen is not None and (errors := chosen.errors(RIGHT)) is not None:
        result = replace(result, output_error=errors[0], nearest_output_error=errors[1])
    if result.off:
        what = f"{step.terms[0].pair.kind}'s T(W)" if step.needs_weight else "W + s·BA"
        why = (
            f"{result.off:,} of {result.elements:,} entries are not {what}, by up to {result.error:.3g} times what "
            "is allowed"
        )
        detected = {what: one.detected for what, one in controls.items()}
        guess = explain_difference(weight, right, detected, is_local=result.off <= result.elements / 100)
        return replace(result, outcome=Outcome.DIFFERENT, why=f"{why}: {guess}" if guess else why)
    if chosen is not None and (why := _not_chosen(chosen)):
        return replace(result, outcome=Outcome.DIFFERENT, why=why)
    missed = [what for what, detected in result.controls.items() if not detected]
    if missed:
        why = f"it also fits the sum with {' and '.join(missed)}: rounding to {weight.stored_as} hides the difference"
        return replace(result, outcome=Outcome.UNDECIDED, why=why)
    return result


def _not_chosen(chosen: ChosenNumbers) -> str:
    """Why the numbers of a calibrated layer were not chosen by its inputs for W + s·BA; empty where they were."""
    errors = chosen.errors(RIGHT)
    if not chosen.is_calibrated(RIGHT):
        return "the record names it calibrated, and its numbers are rounded to nearest"
    if not chosen.fits(RIGHT):
        return "its numbers were not chosen by the calibration inputs for W + s·BA: others are nearer in the outputs"
    if errors is not None and errors[0] > NOT_WORSE * errors[1]:
        return f"the error of its outputs is {errors[0]:.3g} of the adapter's effect; the nearest have {errors[1]:.3g}"
    return ""


def judge_unknown_layout(step: Step, judge: Callable[[Step], AuditedWeight]) -> AuditedWeight:
    """Compare a square matrix whose layout is unknown with the sums of both layouts. At best it is undecided."""
    results = {layout: judge(replace(step, spec=replace(step.spec, layout=layout))) for layout in OTHER_LAYOUT}
    fitting = [layout for layout, result in results.items() if result.outcome is not Outcome.DIFFERENT]
    first = results[fitting[0]] if fitting else min(results.values(), key=lambda result: result.off)
    if not fitting:
        return replace(first, why=f"{first.why} (its layout is unknown: it is not the sum of either layout)")
    if all(result.outcome is Outcome.SAME for result in results.values()):
        return first  # the sum is the same in both layouts
    why = (
        f"its layout is unknown: it is the sum for a weight stored {' and for one stored '.join(fitting)}. State the "
        f"layout by {named('layout', 'NAME=out_in')} or NAME=in_out"
    )
    return replace(first, outcome=Outcome.UNDECIDED, why=why)


@dataclass(eq=False)
class _Control:
    """A deliberately wrong sum, and whether the candidate was found to differ from it."""

    wrong: Fp64Sum
    is_wrong: bool = False  # a change that is its own transpose, or zero, makes no difference
    detected: bool = False

    def compare(
        self, block: WeightRows, value: Wide, scratch: Scratch, name: str, chosen: ChosenNumbers | None
    ) -> None:
        if self.detected and chosen is None:
            return
        found = compare_rows(block, self.wrong, scratch)
        if chosen is not None and block.gaps is not None:
            chosen.add(name, found.difference, block.gaps, found.value - block.before)
        self.is_wrong = self.is_wrong or not np.array_equal(found.value, value)
        self.detected = self.detected or found.off > 0


class _Differences:
    """The differences between a candidate and its sum in fp64, over the pieces of one weight."""

    def __init__(self) -> None:
        self.elements = self.off = 0
        self.error = -1.0
        self.worst: WorstElement | None = None
        self.sums = np.zeros(4)  # ‖W‖², ‖V − W‖², <M − W, V − W>, ‖M − V‖²

    def add(self, block: WeightRows, compared: ComparedRows, scratch: Scratch) -> None:
        self.off += compared.off
        self.elements += compared.value.size
        self._add_worst(block, compared)
        value, difference = compared.value, compared.difference
        change = np.subtract(value, block.before, out=scratch.array("change", value.shape))
        with np.errstate(over="ignore", invalid="ignore"):  # entries that are off may have any value
            pairs = (block.before,) * 2, (change,) * 2, (difference, change), (difference,) * 2
            weight_sq, change_sq, added, noise_sq = (np.vdot(one, other) for one, other in pairs)
            self.sums += [weight_sq, change_sq, added + change_sq, noise_sq]  # M - W = (M - V) + (V - W)

    def _add_worst(self, block: WeightRows, compared: ComparedRows) -> None:
        if compared.relative.max(initial=-1.0) <= self.error:
            return
        self.error, position = float(compared.relative.max()), int(compared.relative.argmax())
        if not isinstance(compared.entries, slice):
            position = int(compared.entries[position])
        index = np.unravel_index(position, compared.value.shape)
        in_tensor = (block.rows.start + int(index[0]), *map(int, index[1:]))
        self.worst = WorstElement(in_tensor, float(block.after[index]), float(compared.value[index]))

    def result(self, name: str, controls: Mapping[str, bool]) -> AuditedWeight:
        """What was found, with the outcome `same`."""
        weight_sq, change_sq, kept, noise_sq = map(float, self.sums)
        return AuditedWeight(
            name,
            Fate.CHANGED,
            Outcome.SAME,
            elements=self.elements,
            off=self.off,
            error=max(self.error, 0.0),
            controls=controls,
            relative_change=math.sqrt(change_sq / weight_sq) if weight_sq else None,
            retention=kept / change_sq if change_sq else None,
            noise=math.sqrt(noise_sq / change_sq) if change_sq else None,
            worst=self.worst,
        )


# --- what may have happened to a weight that is different ---

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
