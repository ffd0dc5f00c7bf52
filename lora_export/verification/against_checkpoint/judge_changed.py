"""A weight to which adapters add: every entry against W + s·BA in fp64, and against sums that are wrong on purpose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from lora_export.options.spelling import named
from lora_export.plan import Step
from lora_export.verification.against_checkpoint.changed_weight import ChangedWeight
from lora_export.verification.against_checkpoint.compare_rows import ComparedRows, WeightRows, compare_rows
from lora_export.verification.against_checkpoint.explain_difference import explain_difference
from lora_export.verification.against_checkpoint.fp64_sums import (
    OTHER_LAYOUT,
    Fp64Sum,
    wrong_sums,
)
from lora_export.verification.against_checkpoint.result import AuditedWeight, Fate
from lora_export.verification.against_checkpoint.stored_tensor import Scratch, StoredTensor
from lora_export.verification.parity import Outcome, Wide, WorstElement


def judge_changed(name: str, step: Step, base: StoredTensor, candidate: StoredTensor) -> AuditedWeight:
    """Compare a changed weight with its sum in fp64, and with the controls."""
    weight = ChangedWeight(step, base, candidate, list(candidate.pieces()))
    right = weight.with_norms(Fp64Sum.right(step))
    controls = {what: _Control(weight.with_norms(wrong)) for what, wrong in wrong_sums(right)}
    found = _Differences()
    scratch, others = Scratch(), Scratch()
    for block in weight.blocks():
        compared = compare_rows(block, right, scratch, every_entry=not found.elements)
        found.add(block, compared, scratch)
        for control in controls.values():
            control.compare(block, compared.value, others)
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
        f"layout by {named('layout', 'NAME=out_in')} or NAME=in_out"
    )
    return replace(first, outcome=Outcome.UNDECIDED, why=why)


@dataclass(eq=False)
class _Control:
    """A deliberately wrong sum, and whether the candidate was found to differ from it."""

    wrong: Fp64Sum
    is_wrong: bool = False  # a change that is its own transpose, or zero, makes no difference
    detected: bool = False

    def compare(self, block: WeightRows, value: Wide, scratch: Scratch) -> None:
        if self.detected:
            return
        found = compare_rows(block, self.wrong, scratch)
        self.is_wrong = self.is_wrong or not np.array_equal(found.value, value)
        self.detected = found.off > 0


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
