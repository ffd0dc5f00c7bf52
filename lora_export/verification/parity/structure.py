"""The structure gate: outputs have the same names, shapes and dtypes, and are finite."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from lora_export.errors import count
from lora_export.verification.parity.case import Case
from lora_export.verification.parity.figures import Array, Outputs, is_float
from lora_export.verification.parity.verdict import Outcome, Reason

CANDIDATE, REFERENCE, DEPLOYED = "the candidate", "the reference", "the deployed model"  # as in `Case.runs`


def structure_reasons(case: Case, output: str, *, adapted: bool) -> list[Reason]:
    """The reasons why an output cannot be measured; empty where it can.

    A fault of the candidate is `different`. A fault of another run is `undecided`: the measure itself is broken.
    """
    by_run = {run: outputs[output] for run, outputs in case.runs.items() if output in outputs}
    for problems in (  # each is evaluated only where those before it found nothing
        _missing(case, by_run, adapted=adapted),
        itertools.chain(_wrong_shapes(case, by_run), _wrong_dtypes(case, by_run)),
        _not_finite(case, output, by_run),
    ):
        if reasons := [Reason(outcome, "structure", text, case.name, output) for outcome, text in problems]:
            return reasons
    return []


StructureProblem = tuple[Outcome, str]


def _missing(case: Case, by_run: Outputs, *, adapted: bool) -> Iterator[StructureProblem]:
    if list(by_run) == [CANDIDATE]:
        yield Outcome.DIFFERENT, "only the candidate has this output"
        return
    for run in case.runs:
        if run not in by_run:
            yield _outcome(run), f"{run} lacks this output"
    if adapted and (case.base is None or case.scaled is None):
        missing = "without adapters" if case.base is None else "with every scale × 1.1"
        yield Outcome.UNDECIDED, f"the case was not run {missing}, so a control cannot be checked"


def _wrong_shapes(case: Case, by_run: Outputs) -> Iterator[StructureProblem]:
    shape = by_run[REFERENCE].shape
    for run, array in by_run.items():
        if array.shape != shape:
            shapes = f"{list(array.shape)}, the reference's is {list(shape)}"
            yield _outcome(run), f"{run}'s shape is {shapes}, for the inputs {case.inputs_summary}"


def _wrong_dtypes(case: Case, by_run: Outputs) -> Iterator[StructureProblem]:
    deployed = by_run[DEPLOYED]
    for run, array in by_run.items():
        if run == CANDIDATE and array.dtype != deployed.dtype:
            yield Outcome.DIFFERENT, f"the candidate's dtype is {array.dtype}, {case.peer}'s is {deployed.dtype}"
        elif run != CANDIDATE and not _are_comparable(array, deployed):
            yield (
                Outcome.UNDECIDED,
                f"{run}'s dtype is {array.dtype} and {case.peer}'s is {deployed.dtype}: these are not comparable",
            )


def _outcome(run: str) -> Outcome:
    return Outcome.DIFFERENT if run == CANDIDATE else Outcome.UNDECIDED


def _are_comparable(array: Array, deployed: Array) -> bool:
    """Floats of any width are comparable. Integers and booleans need the same dtype."""
    if is_float(deployed):
        return is_float(array)
    return array.dtype == deployed.dtype and deployed.dtype.kind in "iub"


def _not_finite(case: Case, output: str, by_run: Outputs) -> Iterator[StructureProblem]:
    """NaN and infinity. NaN in all runs is no agreement: where the measure is not finite, nothing is decided."""
    measure_is_finite = np.isfinite(by_run[REFERENCE]) & np.isfinite(by_run[DEPLOYED])
    for run, array in by_run.items():
        bad = ~np.isfinite(array)
        is_fault_of_candidate = run == CANDIDATE and bool(np.any(bad & measure_is_finite))
        if is_fault_of_candidate:
            bad &= measure_is_finite
        if bad.any():
            index = tuple(int(i) for i in np.argwhere(bad)[0])
            place = list(case.index(output, index))
            yield (
                Outcome.DIFFERENT if is_fault_of_candidate else Outcome.UNDECIDED,
                f"{run} has {count(int(bad.sum()), 'value')} not finite, the first at {place}: "
                f"{float(array[index])}, where the reference has {float(by_run[REFERENCE][index]):.9g}",
            )
