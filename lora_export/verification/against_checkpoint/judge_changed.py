"""A weight to which adapters add: every entry against W + s·BA in fp64, and against sums that are wrong on purpose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lora_export.plan import Step
from lora_export.verification.against_checkpoint.changed_weight import ChangedWeight
from lora_export.verification.against_checkpoint.explain_difference import explain_difference
from lora_export.verification.against_checkpoint.fp64_sums import (
    OTHER_LAYOUT,
    Fp64Sum,
    allowed_error,
    wrong_sums,
)
from lora_export.verification.against_checkpoint.result import AuditedWeight, Fate
from lora_export.verification.against_checkpoint.stored_tensor import StoredTensor
from lora_export.verification.parity import Outcome, Wide, WorstElement


def judge_changed(name: str, step: Step, base: StoredTensor, candidate: StoredTensor) -> AuditedWeight:
    """Compare a changed weight with its sum in fp64, and with the controls."""
    weight = ChangedWeight(step, base, candidate, list(candidate.pieces()))
    right = weight.with_norms(Fp64Sum.right(step))
    controls = {what: _Control(weight.with_norms(wrong)) for what, wrong in wrong_sums(right)}
    found = _Differences(candidate.dtype)
    for rows in weight.pieces:
        before, after = weight.before(rows), weight.after(rows)
        value, bound = right.rows(rows, before)
        found.add(rows, before, after, value, bound)
        for control in controls.values():
            control.compare(rows, before, after, value, candidate.dtype)
    result = found.result(name, {what: one.detected for what, one in controls.items() if one.is_wrong})
    if result.off:
        why = (
            f"{result.off:,} of {result.elements:,} entries are not W + s·BA, by up to {result.error:.3g} times what "
            "is allowed"
        )
        detected = {what: one.detected for what, one in controls.items()}
        guess = explain_difference(weight, right, detected, is_local=result.off <= result.elements / 100)
        return replace(result, outcome=Outcome.DIFFERENT, why=f"{why}: {guess}" if guess else why)
    missed = [what for what, detected in result.controls.items() if not detected]
    if missed:
        why = f"it also fits the sum with {' and '.join(missed)}: rounding to {candidate.dtype} hides the difference"
        return replace(result, outcome=Outcome.UNDECIDED, why=why)
    return result


def judge_unknown_layout(name: str, step: Step, base: StoredTensor, candidate: StoredTensor) -> AuditedWeight:
    """Compare a square matrix whose layout is unknown with the sums of both layouts. At best it is undecided."""
    results = {
        layout: judge_changed(name, replace(step, spec=replace(step.spec, layout=layout)), base, candidate)
        for layout in OTHER_LAYOUT
    }
    fitting = [layout for layout, result in results.items() if result.outcome is not Outcome.DIFFERENT]
    first = results[fitting[0]] if fitting else min(results.values(), key=lambda result: result.off)
    if not fitting:
        return replace(first, why=f"{first.why} (its layout is unknown: it is not the sum of either layout)")
    if all(result.outcome is Outcome.SAME for result in results.values()):
        return first  # the sum is the same in both layouts
    why = (
        f"its layout is unknown: it is the sum for a weight stored {' and for one stored '.join(fitting)}. State the "
        "layout by --layout NAME=out_in or NAME=in_out"
    )
    return replace(first, outcome=Outcome.UNDECIDED, why=why)


@dataclass(eq=False)
class _Control:
    """A deliberately wrong sum, and whether the candidate was found to differ from it."""

    wrong: Fp64Sum
    is_wrong: bool = False  # a change that is its own transpose, or zero, makes no difference
    detected: bool = False

    def compare(self, rows: slice, before: Wide, after: Wide, value: Wide, dtype: np.dtype[Any]) -> None:
        if self.detected:
            return
        other, bound = self.wrong.rows(rows, before)
        self.is_wrong = self.is_wrong or not np.array_equal(other, value)
        self.detected = not (np.abs(after - other) <= allowed_error(other, bound, dtype)).all()


class _Differences:
    """The differences between a candidate and its sum in fp64, over the pieces of one weight."""

    def __init__(self, dtype: np.dtype[Any]):
        self.dtype = dtype
        self.elements = self.off = 0
        self.error = -1.0
        self.worst: WorstElement | None = None
        self.sums = np.zeros(4)  # ‖W‖², ‖V − W‖², <M − W, V − W>, ‖M − V‖²

    def add(self, rows: slice, before: Wide, after: Wide, value: Wide, bound: Wide) -> None:
        distance, allowed = np.abs(after - value), allowed_error(value, bound, self.dtype)
        self.off += distance.size - int(np.count_nonzero(distance <= allowed))  # NaN is off
        self.elements += distance.size
        relative = np.nan_to_num(distance / allowed, nan=np.inf, posinf=np.inf)
        if relative.max(initial=-1.0) > self.error:
            position = int(relative.argmax())
            self.error, index = float(relative.max()), np.unravel_index(position, relative.shape)
            in_tensor = (rows.start + int(index[0]), *map(int, index[1:]))
            self.worst = WorstElement(in_tensor, float(after[index]), float(value[index]))
        change = value - before
        with np.errstate(over="ignore", invalid="ignore"):  # entries that are off may have any value
            products = [np.vdot(x, y) for x, y in ((before, before), (change, change), (after - before, change))]
            self.sums += [*products, np.square(distance).sum()]

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
