"""Run a candidate on the inputs of a proof: on each case, with each input drawn again, and once more at the end.

Outputs are kept until they are judged, large ones on the disk.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import LoraExportError, RuntimeRefused, first_line
from lora_export.runtime.kv_cache import graph_of
from lora_export.runtime.memory import release_memory
from lora_export.runtime.runner import Arrays, Placement, Runner, RunsTogether
from lora_export.runtime.several_graphs import SeveralGraphs
from lora_export.verification import parity
from lora_export.verification.compare_outputs import aligned, candidate_errors, differ, same_bits
from lora_export.verification.inputs import Inputs

OutputsByCase = Mapping[str, Arrays]

INPUTS_NOT_CHANGED = "whether each input affects the outputs"

OnProofStep = Callable[[str], None]  # is called with the name of each step of a proof


@dataclass(frozen=True, eq=False)
class CandidateOutputs:
    """The outputs of a candidate, before any reference runs."""

    by_case: OutputsByCase  # without the refused cases
    refusals: tuple[str, ...] = ()
    # The rest is empty where a case was refused.
    changed: Mapping[str, bool] = field(default_factory=dict)  # input -> whether another draw of it changes an output
    repeated: Arrays | None = None  # of the first case, run again after all others; None where every bit is the same
    notes: tuple[str, ...] = ()

    @property
    def findings(self) -> parity.Findings:
        """What the runs show; not judged are the refused cases, and what was not tried for that reason."""
        return parity.Findings(self.notes, self.refusals if self.changed else (*self.refusals, INPUTS_NOT_CHANGED))


def run_candidate(candidate: Runner, inputs: Inputs, step: OnProofStep) -> CandidateOutputs:
    """Run every case, then each input drawn again, then the first case once more.

    The last run reveals dropout, a lost adapter, and a cache that outlives a call.
    """
    by_case: dict[str, Arrays] = {}
    refusals = []
    run = run_ahead(candidate, [*inputs.cases.values(), *inputs.perturbed.values()])
    for name, arrays in inputs.cases.items():
        step(f"case {name}")
        try:
            by_case[name] = run(arrays)
        except RuntimeRefused as refusal:
            refusals.append(f"case {name}, which the candidate refused: {refusal}")
    if refusals:
        return CandidateOutputs(by_case, tuple(refusals))
    step("inputs, one by one")
    changed = changed_outputs(run, inputs, by_case)
    first, arrays = next(iter(inputs.cases.items()))
    repeated = candidate.run(arrays)
    if same_bits(by_case[first], repeated):
        return CandidateOutputs(by_case, changed=changed)
    note = f"the candidate returns other bits when it runs {first} again"
    return CandidateOutputs(by_case, changed=changed, repeated=repeated, notes=(note,))


def close_graphs(candidate: Runner) -> None:
    """Give back the memory of a candidate's sessions of onnxruntime. Its next run opens them again."""
    graph = candidate if isinstance(candidate, SeveralGraphs) else graph_of(candidate)
    if graph is not None:
        graph.close()
        release_memory()


def findings_on_runner(candidate: Runner) -> parity.Findings:
    """How a candidate runs, and what it cannot give."""
    lacking = (f"the candidate gives no {what}" for what in getattr(candidate, "cannot_give", ()))
    return parity.Findings((*getattr(candidate, "notes", ()), *lacking))


def run_ahead(runner: Runner, inputs: Sequence[Arrays]) -> Callable[[Arrays], Arrays]:
    """A function that runs some inputs, and keeps the outputs.

    The first call computes these `inputs` together, where the runner reads its weights once for all of them.
    """

    @functools.cache
    def together() -> dict[int, Arrays]:
        known: list[Arrays] | None = None
        if isinstance(runner, RunsTogether):
            with contextlib.suppress(RuntimeRefused):  # the run of its case raises it again
                known = runner.run_together(inputs, kept)
        return {id(arrays): own for arrays, own in zip(inputs, known or [], strict=False)}

    def run(arrays: Arrays) -> Arrays:
        found = together().get(id(arrays))
        return kept(runner.run(arrays)) if found is None else found

    return run


def changed_outputs(
    run: Callable[[Arrays], Arrays], inputs: Inputs, known: OutputsByCase, returned: Collection[str] = ()
) -> dict[str, bool]:
    """Input -> whether another draw of it, with the other inputs held, changes an output.

    `known` are the outputs of `run` by case. Outputs that are not among the `returned` do not count, if any are.
    """
    if not inputs.perturbed:
        return {}
    case = next((name for name, arrays in inputs.cases.items() if arrays is inputs.varied), "")
    before = known[case] if case in known else run(inputs.varied)
    before = {name: value for name, value in before.items() if name in returned} or before
    return {name: differ(before, run(arrays)) for name, arrays in inputs.perturbed.items()}


def sensitivity_of(
    outputs: CandidateOutputs, peer: Runner, inputs: Inputs, known: OutputsByCase
) -> tuple[parity.Sensitivity, ...]:
    """Whether each input changes the outputs of the peer and of the candidate, of those that the candidate returns.

    `known` are the peer's outputs by case.
    """
    if not outputs.changed:
        return ()
    run = run_ahead(peer, list(inputs.perturbed.values()))
    expected = changed_outputs(run, inputs, known, next(iter(outputs.by_case.values())))
    return tuple(parity.Sensitivity(name, expected[name], changed) for name, changed in outputs.changed.items())


def run_with_provider_defaults(
    candidate: Runner, cases: Sequence[parity.Case], inputs: Inputs, *, dtype: str, names_known: bool
) -> parity.Findings:
    """Run the cases with the provider's own settings; nothing where the proof runs with these.

    Outputs within the limits of `dtype` are a note. Others are not judged: a program that leaves the settings as they
    are returns them, and the settings are not the candidate's.
    """
    placement: Placement | None = getattr(candidate, "placement", None)
    if placement is None or not placement.options:
        return parity.Findings()
    settings = ", ".join(f"{name}={value}" for name, value in placement.options.items())
    begin = f"{placement.requested_provider}'s own settings in place of {settings}, as judged"
    try:
        shipped: Runner = candidate.with_provider_defaults()  # type: ignore[attr-defined]
        outputs = {case.name: shipped.run(inputs.cases[case.name]) for case in cases}
    except LoraExportError as refusal:
        return parity.Findings(not_judged=(f"{begin}: it did not run: {first_line(refusal)}",))
    own = [
        replace(case, candidate=aligned(outputs[case.name], case.reference, names_known=names_known)) for case in cases
    ]
    judged, errors = candidate_errors(cases), []
    for output, (error, relative) in candidate_errors(own).items():
        of_effect = "" if relative is None else f", {parity.percent(relative)} of the adapter effect"
        errors.append(f"the error of {output} is {error:.3g} ({judged[output][0]:.3g} as judged){of_effect}")
    measured = f"{begin}: {'; '.join(errors)}"
    if parity.judge(own, dtype=dtype).outcome is parity.Outcome.SAME:
        return parity.Findings(notes=(f"{measured}. These outputs are within the limits, too",))
    return parity.Findings(not_judged=(measured,))


LARGEST_IN_MEMORY = 1 << 26  # bytes of one output


def kept(outputs: Arrays) -> Arrays:
    """The same outputs. Large ones are mapped, read-only, from a temporary file without a name.

    The system can take their memory back. Where the disk is full, they stay in memory.
    """
    return {name: _on_disk(array) if array.nbytes > LARGEST_IN_MEMORY else array for name, array in outputs.items()}


def _on_disk(array: NDArray[Any]) -> NDArray[Any]:
    with contextlib.suppress(OSError), tempfile.TemporaryFile() as file:
        np.ascontiguousarray(array).tofile(file)
        file.flush()
        return np.asarray(np.memmap(file, array.dtype, "r", shape=array.shape))
    return array
