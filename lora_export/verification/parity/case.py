"""One set of inputs, the outputs of every run on it, and the structure gate: whether these can be compared."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import count
from lora_export.verification.parity.figures import PYTORCH, Array, Outputs, is_float
from lora_export.verification.parity.verdict import Outcome, Reason


@dataclass(frozen=True, eq=False)
class Case:
    """The outputs of all runs on one set of inputs, by output name.

    `candidate` and `deployed` are in the deployed dtype, all others in fp64. `base` and `scaled` are None only
    where there is no adapter at all.

    `attached` is set where the candidate stores its merged weights in a low precision. Then `reference`, `base` and
    `scaled` use weights that are rounded in the same way, and `attached` does not: its distance from `reference` is
    the merge loss. `base` is rounded too, because the rounding of the base's own weights is no effect of the adapter.

    `unjudged` are positions whose outputs mean nothing: a decoder attends to nothing before a row's first token, and
    with a cache it computes other numbers there than without. They are left out of every figure (`judged`), and so are
    those of `unjudged_by_output`, in these outputs alone: on their first two axes, whatever these are.
    """

    name: str
    inputs_summary: str  # such as "input_ids int64 [2, 7]"
    reference: Outputs
    deployed: Outputs
    candidate: Outputs
    base: Outputs | None = None
    scaled: Outputs | None = None
    attached: Outputs | None = None
    peer: str = PYTORCH  # the implementation that computed `deployed`
    unjudged: NDArray[np.bool_] | None = None  # [batch, sequence]
    unjudged_by_output: Mapping[str, NDArray[np.bool_]] = field(default_factory=lambda: MappingProxyType({}))
    filled: frozenset[str] = frozenset()  # the outputs whose fill values are set to zero, see `special_values`
    positions: Mapping[str, NDArray[np.intp]] = field(default_factory=lambda: MappingProxyType({}))  # see `judged`

    @property
    def by_role(self) -> dict[str, Outputs]:
        """The outputs of every run of the case, by the field that has them."""
        roles = ("reference", "deployed", "candidate", "base", "scaled", "attached")
        return {role: outputs for role in roles if (outputs := getattr(self, role)) is not None}

    @property
    def runs(self) -> dict[str, Outputs]:
        """The outputs of every run of the case, by the name that a message gives the run."""
        every = {
            "the candidate": self.candidate,
            "the reference": self.reference,
            "the deployed model": self.deployed,
            "the base": self.base,
            "the reference with scale × 1.1": self.scaled,
            "the attached reference": self.attached,
        }
        return {run: outputs for run, outputs in every.items() if outputs is not None}

    @property
    def outputs(self) -> list[str]:
        """The name of every output that any run has: one that is missing elsewhere is compared too."""
        return list(dict.fromkeys(name for arrays in self.runs.values() for name in arrays))

    def judged(self) -> Case:
        """The case without the positions that are not judged, in each output of (batch, sequence, …).

        Such an output becomes (positions, …), and `positions` has the batch and sequence of each. Positions where a
        run is not finite stay.
        """
        if self.unjudged is None and not self.unjudged_by_output:
            return self
        judged = {name: found for name in self.reference if (found := self._judged_positions(name)) is not None}
        reduced: dict[str, Any] = {
            role: {name: value[judged[name]] if name in judged else value for name, value in outputs.items()}
            for role, outputs in self.by_role.items()
        }
        positions = {name: np.argwhere(mask) for name, mask in judged.items()}
        return replace(self, **reduced, unjudged=None, unjudged_by_output={}, positions=positions)

    def _judged_positions(self, output: str) -> NDArray[np.bool_] | None:
        """Bool, the output's first two axes; None where these are no positions, or other ones in a run."""
        arrays = [outputs[output] for outputs in self.runs.values() if output in outputs]
        shape = self.reference[output].shape
        given = (self.unjudged if len(shape) > 2 else None, self.unjudged_by_output.get(output))
        unjudged = [positions for positions in given if positions is not None and positions.shape == shape[:2]]
        if not unjudged or any(array.shape != shape for array in arrays):
            return None
        finite = np.all([np.isfinite(array).reshape(*shape[:2], -1).all(-1) for array in arrays], axis=0)
        judged: NDArray[np.bool_] = ~(np.any(unjudged, axis=0) & finite)
        return judged

    def index(self, output: str, index: tuple[int, ...]) -> tuple[int, ...]:
        """The index of an element in the output as it was computed, where positions were left out."""
        if output not in self.positions:
            return index
        return (*map(int, self.positions[output][index[0]]), *index[1:])


# --- structure: outputs have the same names, shapes and dtypes, and are finite ---

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
