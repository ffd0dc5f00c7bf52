"""Checks of all cases together: something was compared, controls were detected, inputs have an effect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_export.options.spelling import command, named
from lora_export.verification.parity.case import Case
from lora_export.verification.parity.gates import CONTROL_VALUE_FACTOR, CONTROL_VALUE_FACTOR_OF, CONTROLS
from lora_export.verification.parity.verdict import Comparison, Figures, Outcome, Reason, Sensitivity


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
    """What is wrong with an input that the export replaced by a constant."""
    return (
        f"changing the input {frozen.input} changes {peer}'s outputs and not the candidate's: the export replaced this "
        "input by a constant"
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
