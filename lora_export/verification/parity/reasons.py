"""The reasons in words: what is wrong with an output or a whole set, or could not be decided, and the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lora_export.errors import count
from lora_export.options.spelling import command, named
from lora_export.verification.parity.case import Case
from lora_export.verification.parity.figures import Control, Figures
from lora_export.verification.parity.gates import (
    CONTROL_VALUE_FACTOR,
    CONTROL_VALUE_FACTOR_OF,
    CONTROLS,
    DISTANCES,
    LARGEST_ERROR,
    VALUE_CONTROLS,
)
from lora_export.verification.parity.verdict import Comparison, Outcome, Reason, Sensitivity, multiple, percent


def reasons_of(case: str, output: str, f: Figures) -> list[Reason]:
    """The reasons against the candidate or, only where there are none, the reasons why the check cannot decide."""
    differences = _differences(f)
    outcome = Outcome.DIFFERENT if differences else Outcome.UNDECIDED
    remedies = {} if differences else _remedies(f)
    return [
        Reason(outcome, gate, text, case, output, remedies.get(gate, ""))
        for gate, text in (differences or _doubts(f)).items()
    ]


# --- different ---


def _differences(f: Figures) -> dict[str, str]:
    failed = {gate.name: gate for gate in f.gates if not gate.passed}
    matched = [CONTROLS[control.name].model for control in f.controls if control.is_missed]
    suspicion = f". The candidate matches {matched[0]}" if matched else ""
    texts = {}
    if gate := failed.get("error"):
        ratio = f" (× {f.ratio:.3g})" if f.ratio is not None else ""
        texts["error"] = (
            f"the error is {f.error:.3g}, allowed is {gate.allowed:.3g}; {f.peer}'s own error is "
            f"{f.deployed_error:.3g}{ratio}{suspicion}"
        )
    if gate := failed.get("tail"):
        texts["tail"] = f"{_worst_element(f)}, allowed is {gate.allowed:.3g}{suspicion}"
    if gate := failed.get("bulk"):
        texts["bulk"] = (
            f"the median error is {gate.value:.3g}, allowed is {gate.allowed:.3g}, because {f.peer}'s own error is in "
            f"a few elements{suspicion}"
        )
    if gate := failed.get("exact"):
        wrong = f"{gate.value:.0f} of {count(math.prod(f.shape), 'value')}"
        texts["exact"] = f"{wrong} are neither the reference's nor {f.peer}'s; {_worst_element(f)}"
        if "int" in f.dtype:
            texts["exact"] += ". If these are indices of scores that tie, only an output with the scores can show it"
    if gate := failed.get("tolerance"):
        texts["tolerance"] = (
            f"outside the tolerance: max(|candidate - reference| - rtol · |reference|) is {gate.value:.3g}, "
            f"atol is {gate.allowed:.3g}"
        )
    return texts


def _worst_element(f: Figures) -> str:
    worst = f.worst
    return (
        f"the element at {list(worst.index)} is {worst.candidate:.9g}, the reference has {worst.reference:.9g}: off by "
        f"{f.max_error:.3g}, {f.peer} is off by at most {f.deployed_max_error:.3g}"
    )


# --- undecided ---


def _doubts(f: Figures) -> dict[str, str]:
    failed = {gate.name for gate in f.gates if not gate.passed}
    texts = {}
    if "effect" in failed and f.relative_to_effect is not None:
        texts["effect"] = (
            f"the error {f.error:.3g} is {percent(f.relative_to_effect)} of the adapter's effect ({f.effect:.3g}). "
            f"Above {percent(LARGEST_ERROR)}, a merged model cannot be distinguished from an unmerged one"
        )
    if "loss" in failed:
        cost = "all" if f.merge_loss is None else percent(f.merge_loss)
        texts["loss"] = (
            f"rounding the merged weights costs {cost} of the adapter's effect. The file is what such a merge should "
            "be, but it is not known whether the adapter is still in it"
        )
    return texts | {control.name: _missed(control, f) for control in f.controls if control.is_missed}


def _missed(control: Control, f: Figures) -> str:
    kind = CONTROLS[control.name]
    gates = "the gates: they are too wide for this output, or the adapter has too little effect on it"
    if control.name == "tolerance":
        gates = f"the tolerance: it is wider than the adapter's effect ({f.effect:.3g})"
    return (
        f'control "{kind.title}": {kind.model} (off by {control.error:.3g}; {f.peer}\'s own error is '
        f"{f.deployed_error:.3g}) passes {gates}"
    )


def _remedies(f: Figures) -> dict[str, str]:
    """What would resolve each doubt, by its gate or control, in numbers, so that users need no trial runs.

    An adapter with enough effect for the most demanding doubt has enough for all.
    """
    remedies = {
        "loss": f"weights in a finer type (merge {named('dtype', 'float32')}, or a graph of more bits), or the adapter "
        f"beside the weights (onnx {named('lora', 'nodes')})"
    }
    text = f"inputs on which {f.peer}'s own error is smaller relative to the values ({named('inputs')})"
    remedies |= dict.fromkeys(VALUE_CONTROLS, text)
    for control in f.controls:
        if control.name == "tolerance":
            # The largest error of an element is at least the rmse.
            remedies["tolerance"] = (
                f"an {named('atol')} below {control.error:.2g} with {named('rtol', 0)}, or no tolerance"
            )
    if factor := _factor_of_effect(f):
        text = (
            f"an adapter with {multiple(factor)} times the effect on this output, or inputs on which this one has it "
            f"({named('inputs')})"
        )
        remedies |= dict.fromkeys(("effect", *DISTANCES), text)
    return remedies


def _factor_of_effect(f: Figures) -> float | None:
    """How many times as large the adapter's effect would have to be; None where it has none."""
    error = f.gate("error")
    allowed = error.allowed if error else 0.0
    factors = [f.relative_to_effect / LARGEST_ERROR] if f.relative_to_effect else []
    for control in f.controls:
        if control.name not in ("tolerance", *VALUE_CONTROLS) and f.effect and control.is_missed:
            # The candidate's own error and the distance of the wrong reference add up as squares.
            spent = min(1.0, f.error / allowed) if allowed else 1.0
            factors.append(allowed * math.sqrt(1 - spent**2) / (f.effect * DISTANCES[control.name]))
    return 1.05 * max(1.0, *factors) if factors else None


# --- all cases together: something was compared, controls were detected, inputs have an effect ---


def power_reasons(cases: Sequence[Case], comparisons: Sequence[Comparison], *, adapted: bool) -> Iterator[Reason]:
    """The reasons why this set of cases could not have detected a mistake."""
    yield from _nothing_compared(cases, comparisons)
    measured = [comparison.figures for comparison in comparisons if comparison.figures]
    if measured and adapted and not any(f.effect for f in measured):
        yield Reason(
            Outcome.UNDECIDED,
            "effect",
            "the adapter changes no output in any case: the reference gives the same outputs without it",
            remedy=f"an adapter whose B and scale are not zero (`{command('inspect')}` shows them), or inputs that "
            f"reach the layers that it changes ({named('inputs')})",
        )
    else:
        yield from _controls_without_effect(measured)


def _nothing_compared(cases: Sequence[Case], comparisons: Sequence[Comparison]) -> Iterator[Reason]:
    def undecided(why: str, case: str = "", output: str = "") -> Reason:
        return Reason(Outcome.UNDECIDED, "nothing", f"nothing was compared: {why}", case, output)

    if not comparisons:
        yield undecided("there is no case, or no output")
        return
    compared = [comparison for comparison in comparisons if comparison.figures or comparison.reasons]
    for case in cases:
        if not any(comparison.case == case.name for comparison in compared):
            yield undecided("the case has no output, or all outputs are empty", case=case.name)
    for output in dict.fromkeys(comparison.output for comparison in comparisons):
        if not any(comparison.output == output for comparison in compared):
            yield undecided("the output is empty in every case", output=output)


def _controls_without_effect(measured: Sequence[Figures]) -> Iterator[Reason]:
    controls = [control for f in measured for control in f.controls]
    for name in dict.fromkeys(control.name for control in controls):
        if not any(control.detected or control.required for control in controls if control.name == name):
            yield Reason(
                Outcome.UNDECIDED,
                name,
                f'control "{CONTROLS[name].title}": {CONTROLS[name].model} gives the same outputs, in every case',
                remedy="a floating-point output beside those that only select (the logits of an argmax), or more "
                f"inputs ({named('inputs')})",
            )


def input_reasons(sensitivity: Sequence[Sensitivity], peer: str) -> Iterator[Reason]:
    """The inputs gate: every input that changes the peer's outputs must change the candidate's."""
    for each in sensitivity:
        if each.is_frozen:
            yield Reason(Outcome.DIFFERENT, "inputs", frozen_input(each, peer))
    if sensitivity and not any(each.peer_changed for each in sensitivity):
        text = f"no input changes any output of {peer}: each was changed alone"
        yield Reason(Outcome.UNDECIDED, "inputs", text)


def frozen_input(frozen: Sensitivity, peer: str) -> str:
    """What is wrong with an input that has no influence, as where an export replaced it by a constant."""
    return (
        f"changing the input {frozen.input} changes {peer}'s outputs and not the candidate's: to the candidate this "
        "input is a constant"
    )


def notes_on_scope(
    comparisons: Sequence[Comparison], sensitivity: Sequence[Sensitivity], peer: str, *, adapted: bool
) -> Iterator[str]:
    """What the gates and the controls were applied to."""
    measured = [(comparison.output, comparison.figures) for comparison in comparisons if comparison.figures]
    reached = {output for output, f in measured if f.effect}
    unreached = [name for name in dict.fromkeys(output for output, _ in measured) if name not in reached]
    if not adapted and comparisons:
        controls = {control.name for _, f in measured for control in f.controls}
        factor = CONTROL_VALUE_FACTOR_OF["bfloat16"] if "values_1.1" in controls else CONTROL_VALUE_FACTOR
        yield f"there is no adapter: the effect gate was not applied, and the control is every value × {factor}"
    elif unreached:
        yield f"the adapter does not reach {', '.join(unreached)}: the effect gate was not applied there"
    for each in sensitivity:
        if not each.peer_changed:
            yield f"the input {each.input} does not change {peer}'s outputs: whether the candidate uses it is not known"
