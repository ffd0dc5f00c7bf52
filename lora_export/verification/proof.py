"""The flow of every proof: run candidate and references on the same inputs, judge, and find where they differ.

What differs between PyTorch (`against_pytorch`) and a graph (`against_graph`) as references is in `References`. A graph
that takes adapters, without one, may also be judged by the bits of the graph that it was made from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lora_export.callbacks import ignore
from lora_export.errors import InputRefused, LoraExportError, RuntimeRefused, brief
from lora_export.options.spelling import named
from lora_export.provenance import adapter_records
from lora_export.runtime.kv_cache import CacheRunner
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import Arrays, Placement, Runner
from lora_export.verification import parity
from lora_export.verification.candidate_outputs import (
    CandidateOutputs,
    OnProofStep,
    OutputsByCase,
    run_candidate,
    run_with_provider_defaults,
)
from lora_export.verification.compare_outputs import (
    aligned,
    bits_that_differ,
    different_by_themselves,
    differs_in_precision_alone,
    error_of,
    named_as,
    with_larger_peer_error,
)
from lora_export.verification.diagnose.diagnosis import Diagnosis
from lora_export.verification.inputs import Inputs
from lora_export.verification.references import FurtherPeer, PreparedReferences, ReferenceOutputs, References


@dataclass(frozen=True, eq=False, repr=False)
class Proof:
    """A verdict on what a candidate computes, with what it takes to trust and to repeat it.

    Every report shows one of these, or an `Audit`: the verdict on a checkpoint's weights, which has the same facts.
    """

    verdict: parity.Verdict
    placement: Placement | None = None  # None where PyTorch itself ran the candidate
    about: Mapping[str, Any] = field(default_factory=dict)  # versions, files, seed, adapters, and the inputs' shapes
    inputs: Mapping[str, Arrays] = field(default_factory=dict)  # by case, of all runs
    cases: tuple[parity.Case, ...] = ()  # the outputs of all runs
    diagnosis: Diagnosis | None = None  # where the candidate goes wrong, and why; or that it nowhere does
    error: LoraExportError | None = None  # what ended the proof before anything was measured
    seconds: float = 0.0  # of the whole run

    def __repr__(self) -> str:
        return brief(self, self.verdict.headline)

    def _repr_html_(self) -> str:
        return self.verdict._repr_html_()

    def strictly(self) -> Proof:
        """The proof whose verdict is undecided where a part of the candidate was not judged."""
        return replace(self, verdict=self.verdict.strictly())

    def with_files(self, found: parity.Findings) -> Proof:
        """The proof, and what was found of the files beside the weights; one difference in them makes it different."""
        files = parity.with_findings(replace(self.verdict, reasons=()), found, "files")  # whose reasons come first
        return replace(self, verdict=parity.with_reasons(files, *self.verdict.reasons))

    @property
    def exit_code(self) -> int:
        return self.verdict.exit_code if self.error is None else self.error.exit_code

    def differs_only_beyond(self, sizes: Mapping[str, int], axes: Mapping[str, Mapping[int, str]]) -> bool:
        """Whether all differences are in cases that have a larger size of one of these symbols."""
        beyond = {
            case
            for case, arrays in self.inputs.items()
            for name, own in axes.items()
            for axis, symbol in own.items()
            if name in arrays and arrays[name].shape[axis] > sizes.get(symbol, arrays[name].shape[axis])
        }
        differing = [reason for reason in self.verdict.reasons if reason.outcome is parity.Outcome.DIFFERENT]
        return bool(differing) and all(reason.case in beyond for reason in differing)


def prove(
    candidate: Runner,
    references: References,
    *,
    atol: float | None = None,
    rtol: float | None = None,
    trace: bool = False,
    step: OnProofStep = ignore,
) -> Proof:
    """Judge whether a candidate computes what its references compute.

    Candidate and references run on several sets of seeded inputs of different shapes, and on the user's own. `atol`
    and `rtol` are a further demand on the candidate. A candidate that is different is compared module by module,
    where the references can do so; with `trace`, any is. `step` is called with the name of each step.
    Raises EnvironmentLacking where the requested provider did not do the work, MatchError where the adapters do not
    fit the model, InputRefused where no inputs can be made, and RuntimeRefused where the candidate runs on none.
    """
    placement: Placement | None = getattr(candidate, "placement", None)
    if placement is not None:
        placement.require_provider()
    inputs = references.inputs(candidate)
    prepared = references.prepare(candidate, inputs)
    outputs = run_candidate(candidate, inputs, step)
    if not outputs.by_case:
        raise RuntimeRefused(references.explain(outputs.refusals[0]))
    expected = prepared.run(outputs, step)
    if expected.unreached:
        step("inputs that reach more pairs")
        if further := references.reaching(candidate, expected.unreached):
            return prove(candidate, further, atol=atol, rtol=rtol, trace=trace, step=step)
    trial = _Trial(inputs, outputs, prepared, bool(references.adapters), step, atol, rtol)
    expected, verdict, cases = trial.decide(expected)
    verdict = _with_remedy(verdict, references.remedy)
    if all(comparison.figures for comparison in verdict.comparisons):
        step("the provider's own settings")
        names_known = expected.names_known
        found = run_with_provider_defaults(candidate, cases, inputs, dtype=expected.dtype, names_known=names_known)
        verdict = parity.with_findings(verdict, found, "settings")
    diagnosis = None
    has_outputs = any(case.candidate for case in cases)
    if has_outputs and (trace or verdict.outcome is parity.Outcome.DIFFERENT):
        diagnosis, notes = prepared.diagnose(_to_diagnose(cases, verdict, inputs), every=trace, step=step)
        verdict = parity.with_findings(verdict, parity.Findings(tuple(notes)), "diagnosis")
    about = _about(references, inputs, atol, rtol)
    proof = Proof(verdict, placement, about, inputs.cases, tuple(cases), diagnosis=diagnosis)
    if references.adapters or not expected.is_quantised or verdict.outcome is not parity.Outcome.UNDECIDED:
        return proof
    return _by_origin(proof, candidate, references, step)


LEAST_DIAGNOSED = 32  # values of the inputs of a case whose modules are compared, where there is one

# --- steps of the flow -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Trial:
    """What a candidate computed, judged beside the outputs of its references."""

    inputs: Inputs
    outputs: CandidateOutputs
    prepared: PreparedReferences
    has_adapters: bool
    step: OnProofStep
    atol: float | None
    rtol: float | None

    def cases(self, expected: ReferenceOutputs) -> list[parity.Case]:
        """The outputs of all runs, case by case; none of the candidate's where it refused the case."""
        cases = []
        for name, summary in self.inputs.summaries.items():
            by_role: dict[str, Any] = {role: by_case[name] for role, by_case in expected.by_role.items()}
            own = self.outputs.by_case.get(name, {})
            case = parity.Case(
                name,
                summary,
                deployed=expected.deployed[name],
                candidate=aligned(own, by_role["reference"], names_known=expected.names_known),
                peer=expected.peer,
                unjudged=self.inputs.unjudged.get(name),
                unjudged_by_output=expected.unjudged.get(name, {}),
                **by_role,
            )
            cases.append(case)
        return cases

    def judge(self, expected: ReferenceOutputs, cases: Sequence[parity.Case], *notes: str) -> parity.Verdict:
        """The verdict on the cases, and on the first case run again where that returned other bits."""
        judged = list(cases)
        if self.outputs.repeated is not None:
            first = cases[0]
            own = aligned(self.outputs.repeated, first.reference, names_known=expected.names_known)
            judged.append(replace(first, name=f"{first.name}, run again", candidate=own))
        return parity.judge(
            judged,
            dtype=expected.dtype,
            sensitivity=expected.sensitivity,
            atol=self.atol,
            rtol=self.rtol,
            findings=expected.findings + parity.Findings(notes),
        )

    def decide(self, expected: ReferenceOutputs) -> tuple[ReferenceOutputs, parity.Verdict, list[parity.Case]]:
        """The verdict, its cases, and the outputs that it is by: `expected`, or those with the candidate's choices.

        Another choice where scores tie looks like too much rounding. So references and PyTorch run with the candidate's
        choices where the verdict differs in precision alone, or is undecided, before its controls or after them.
        """
        cases = self.cases(expected)
        verdict = self.judge(expected, cases)
        is_coarse = verdict.outcome is parity.Outcome.UNDECIDED or differs_in_precision_alone(verdict)
        alike = self.prepared.run_alike(self.outputs, self.step) if is_coarse else None
        if alike is None:
            verdict, cases = self.with_controls(expected, verdict, cases)
            if not is_coarse and verdict.outcome is parity.Outcome.UNDECIDED:
                alike = self.prepared.run_alike(self.outputs, self.step)
        if alike is None:
            return expected, verdict, cases
        cases = self.cases(alike)
        return alike, *self.with_controls(alike, self.judge(alike, cases), cases)

    def with_controls(
        self, expected: ReferenceOutputs, verdict: parity.Verdict, cases: list[parity.Case]
    ) -> tuple[parity.Verdict, list[parity.Case]]:
        """The verdict and its cases by further peers where they are needed, and with each pair switched off."""
        if differs_in_precision_alone(verdict):
            verdict, cases = self.by_further_peers(expected, verdict, cases)
        if self.has_adapters and verdict.outcome is not parity.Outcome.DIFFERENT:
            self.step("single pairs")
            found = self.prepared.control_pairs([case for case in cases if case.candidate], expected)
            verdict = parity.with_findings(verdict, found, "pairs")
        return verdict, cases

    def by_further_peers(
        self, expected: ReferenceOutputs, verdict: parity.Verdict, cases: list[parity.Case]
    ) -> tuple[parity.Verdict, list[parity.Case]]:
        """The verdict and its cases by the largest error of the peers, once this is not `different`; else as before.

        They run on the smallest case that is different by itself first. Where none excuses it, the verdict stands.
        """
        differing = different_by_themselves(verdict)
        apart = [case for case in cases if case.name in differing]  # one that is run again may differ, too
        one = min(apart, key=lambda case: self.inputs.values(case.name), default=None)
        if one is not None and len(cases) > 1 and not self.is_excused(expected, one):
            return verdict, cases
        names = [case.name for case in cases]
        for measured, note in _by_each_peer(cases, self.prepared.further_peers(self.step, names)):
            judged = self.judge(expected, measured, note)
            if judged.outcome is not parity.Outcome.DIFFERENT:
                return judged, measured
        return verdict, cases

    def is_excused(self, expected: ReferenceOutputs, case: parity.Case) -> bool:
        """Whether a further peer has an error in this case beside which the candidate's is not different.

        The peers are dropped at the end: those that run on all cases afterwards may take as much memory.
        """
        by_peers = _by_each_peer([case], self.prepared.further_peers(self.step, [case.name]))
        found = (parity.judge(measured, dtype=expected.dtype, gates_only=True) for measured, _ in by_peers)
        return not all(map(different_by_themselves, found))


def _by_each_peer(cases: list[parity.Case], peers: Iterable[FurtherPeer]) -> Iterator[tuple[list[parity.Case], str]]:
    """After each peer: the cases by the largest error of those so far, and the note for a verdict on them."""
    measured = usual = cases
    for peer in peers:
        others = [replace(case, deployed=peer.outputs[case.name]) for case in cases]
        if math.isinf(peer.farthest):
            measured = usual = with_larger_peer_error(usual, others)
        else:
            others = with_larger_peer_error(usual, others, farthest=peer.farthest)
            measured = with_larger_peer_error(measured, others)
        yield measured, peer.note


def _with_remedy(verdict: parity.Verdict, remedy: str) -> parity.Verdict:
    """The verdict, whose doubts name this remedy first."""
    if not remedy or verdict.outcome is not parity.Outcome.UNDECIDED:
        return verdict
    reasons = [
        replace(reason, remedy=f"{remedy}, or {reason.remedy}" if reason.remedy else remedy)
        for reason in verdict.reasons
    ]
    return replace(verdict, reasons=tuple(reasons))


def _to_diagnose(cases: Sequence[parity.Case], verdict: parity.Verdict, inputs: Inputs) -> parity.Case:
    """The smallest of the cases that are different; of all that have outputs, where none is.

    In one of very few values, such as a text of one token, parts of a model have no effect.
    """
    having = [case for case in cases if case.candidate]
    wrong = {reason.case for reason in verdict.reasons if reason.outcome is parity.Outcome.DIFFERENT}
    different = [case for case in having if case.name in wrong]
    sizes = {case: inputs.values(case.name) for case in different or having}
    return min(sizes, key=lambda case: (sizes[case] < LEAST_DIAGNOSED, sizes[case]))


def _about(references: References, inputs: Inputs, atol: float | None, rtol: float | None) -> dict[str, Any]:
    strengths = references.strengths or (1.0,) * len(references.adapters)
    return {
        **references.about(),
        "adapters": adapter_records(references.adapters, strengths),
        "seed": references.seed,
        "tolerance": None if atol is None and rtol is None else {"atol": atol or 0.0, "rtol": rtol or 0.0},
        "inputs": inputs.shapes,
    }


def _by_origin(proof: Proof, candidate: Runner, references: References, step: OnProofStep) -> Proof:
    """The proof of a quantised graph without an adapter that fp64 could not decide."""
    graph = candidate.inner if isinstance(candidate, CacheRunner) else candidate
    if not isinstance(graph, OnnxRunner) or not graph.takes_adapters:
        return proof
    if references.origin is None:
        option = named("base", "BASE.onnx")
        note = f"fp64 cannot decide about this quantised graph; the graph that it was made from can ({option})"
        return replace(proof, verdict=parity.with_findings(proof.verdict, parity.Findings((note,)), "origin"))
    step("the graph that it was made from")
    return prove_by_origin(proof, graph, references.origin, references.as_run)


# --- a graph without an adapter, by the graph that it was made from ---

AGAINST = "the base graph"  # the field `against` of a record, for a verdict without a PyTorch model

UNCHANGED = "its outputs are those of the graph that it was made from, bit for bit"

NODE_BY_NODE = (
    "its outputs are those of the graph that it was made from, bit for bit, where onnxruntime optimises neither; "
    "optimised, other nodes of the two are fused"
)

NOT_BY_FP64 = "whether that graph computes the model was not decided: its outputs are too coarse for a verdict in fp64"

NEAR = 0.1  # largest distance of two graphs that differ only in what onnxruntime fuses, relative to PyTorch's error


def prove_by_origin(proof: Proof, candidate: OnnxRunner, origin: Path, as_run: Callable[[OnnxRunner], Runner]) -> Proof:
    """Decide an undecided proof of a graph without an adapter by the graph that it was made from.

    A base that rounds what it multiplies, to int8 or to half precision, can be too far from its model in fp64. Then
    only its own outputs can decide: the candidate must return their bits. Where onnxruntime fuses other nodes of the
    two graphs, they must return the same bits unoptimised, and optimised they may differ by a tenth of PyTorch's error.
    Returns `proof` where the two graphs differ. `as_run` is that of the proof's references. Raises InputRefused for
    an origin with other inputs or outputs.
    """

    def run(runner: OnnxRunner) -> OutputsByCase:
        return {name: as_run(runner).run(arrays) for name, arrays in proof.inputs.items()}

    def run_origin(like: OutputsByCase, *, optimise: bool) -> OutputsByCase:
        made = OnnxRunner(origin, candidate.provider, optimise=optimise, timeout=candidate.timeout)
        return _run_origin(made, run, like)

    own = run(candidate)
    if not candidate.takes_adapters or bits_that_differ(own, run(candidate)):
        return proof
    before, note = run_origin(own, optimise=True), UNCHANGED
    if difference := bits_that_differ(own, before):
        if not all(_is_near(case, own, before) for case in proof.cases):
            return proof
        note = f"{NODE_BY_NODE} ({difference[0]})"
        own = run(candidate.unoptimised())
        before = run_origin(own, optimise=False)
        if bits_that_differ(own, before):
            return proof
    cases, undecided = tuple(_beside_origin(case, own, before) for case in proof.cases), proof.verdict
    found = parity.Findings((note, NOT_BY_FP64, *undecided.notes))
    verdict = parity.judge(cases, dtype=undecided.dtype, sensitivity=undecided.sensitivity, findings=found)
    return replace(proof, verdict=verdict, about={**proof.about, "against": AGAINST}, cases=cases)


def _run_origin(origin: OnnxRunner, run: Callable[[OnnxRunner], OutputsByCase], like: OutputsByCase) -> OutputsByCase:
    refused = f"{origin.path} is not what the candidate was made from:"
    try:
        outputs = run(origin)
    except RuntimeRefused as error:
        raise InputRefused(f"{refused} {error}") from error
    if any(outputs[case].keys() != own.keys() for case, own in like.items()):
        raise InputRefused(f"{refused} it has other outputs")
    return outputs


def _beside_origin(case: parity.Case, own: OutputsByCase, before: OutputsByCase) -> parity.Case:
    candidate, origin = (named_as(case.reference, outputs[case.name]) for outputs in (own, before))
    return replace(case, candidate=candidate, reference=origin, deployed=origin, peer=AGAINST)


def _is_near(case: parity.Case, own: OutputsByCase, before: OutputsByCase) -> bool:
    """Whether the outputs of two graphs differ by less than a tenth of PyTorch's error."""
    one, other = (named_as(case.reference, outputs[case.name]) for outputs in (own, before))
    return all(
        parity.rms(one[name].astype(np.float64) - other[name]) <= NEAR * error_of(truth, case.deployed[name])
        for name, truth in case.reference.items()
        if parity.is_float(one[name])
    )
