"""A PyTorch model with its adapters attached, run for one candidate: as it would be deployed, then in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from lora_export.callbacks import ignore
from lora_export.runtime.runner import Arrays
from lora_export.runtime.torch_runners import ModuleRunner
from lora_export.verification import parity
from lora_export.verification.candidate_outputs import (
    CandidateOutputs,
    OnProofStep,
    OutputsByCase,
    close_graphs,
    findings_on_runner,
    sensitivity_of,
)
from lora_export.verification.compare_outputs import (
    UnjudgedPositions,
    bits,
    notes_on_padding,
    outputs_beyond_rounding,
    padding_beyond_rounding,
)
from lora_export.verification.diagnose.localize import diagnose_module
from lora_export.verification.inputs import Inputs
from lora_export.verification.inputs.coverage import coverage_of_pairs
from lora_export.verification.inputs.model_inputs import doubts_on_sizes, notes_on_sizes
from lora_export.verification.parity import Findings
from lora_export.verification.proof_session import ProofSession
from lora_export.verification.references import (
    Diagnosed,
    FurtherPeer,
    PreparedReferences,
    ReferenceOutputs,
    note_on_fp64,
)
from lora_export.verification.references.cached_outputs import CacheEntry, cache_key
from lora_export.verification.references.candidate_choices import choice_reader
from lora_export.verification.references.deployed_module import deployed_runner, run_observed
from lora_export.verification.references.fp64_outputs import Fp64References
from lora_export.verification.references.further_peers import further_peers
from lora_export.verification.references.half_precision import note_on_half, returns_halves
from lora_export.verification.references.proof_weights import ProofWeights
from lora_export.verification.references.shared_choices import SharedChoices, shared_choices

NOT_REPEATED = (
    "two runs of PyTorch differ: the model draws random numbers in its forward, and no candidate draws the same ones. "
    "Prove one whose noise is off (in VITS' config noise_scale = 0 and noise_scale_duration = 0), or is an input"
)


@dataclass(frozen=True, eq=False, kw_only=True)
class PyTorchSettings:
    """How the references of a proof run. See `PyTorchReferences`."""

    seed: int = 0
    device: str = "cpu"
    cache: Path | None = None
    fixed: Mapping[str, int] | None = None
    say: Callable[[str], None] = ignore
    session: ProofSession | None = None


@dataclass(eq=False)
class PreparedPyTorch(PreparedReferences):
    """The model with adapters attached, for one candidate. See `PyTorchReferences`."""

    weights: ProofWeights
    inputs: Inputs
    settings: PyTorchSettings
    _fp64: Fp64References | None = field(default=None, init=False)  # once PyTorch ran
    _expected: ReferenceOutputs | None = field(default=None, init=False)  # of `run`, without doubts about PyTorch
    _choices: SharedChoices | None = field(default=None, init=False)  # with which all ran again
    _is_repeated: bool = field(default=True, init=False)  # False: PyTorch draws random numbers, on the CPU

    @cached_property
    def deployed(self) -> ModuleRunner:
        """PyTorch as it would be deployed."""
        return deployed_runner(self.weights, self.settings.device)

    def run(self, outputs: CandidateOutputs, step: OnProofStep) -> ReferenceOutputs:
        weights, cases, how = self.weights, self.inputs.cases, self.settings
        candidate, model = weights.candidate, weights.model
        if weights.is_large:
            close_graphs(candidate)
        step("PyTorch")
        before = torch.get_rng_state()
        found = run_observed(self.deployed, cases, weights)
        draws = not torch.equal(before, torch.get_rng_state())
        self._is_repeated = not draws or _is_repeated(self.deployed, cases, found.outputs)
        own, fixed = found.outputs, doubts_on_sizes(candidate, model, how.fixed)
        sensitivity = sensitivity_of(outputs, self.deployed, self.inputs, own)
        names_known = candidate.names_known and self.deployed.names_known
        key = None if how.cache is None else cache_key(weights, cases, self.deployed.module, own)
        if weights.is_large:  # its weights are made again where they are needed
            del self.deployed
        self._fp64 = Fp64References(weights, cases, CacheEntry(how.cache, key, how.say), how.session)
        by_role, narrow_operators, _ = self._fp64.outputs(step)
        weights.attached.ready = None
        pairs = coverage_of_pairs(weights.attached.module, cases, found.computed or weights.attached.computed)
        is_half = weights.is_half_inside or returns_halves(outputs.by_case, own, names_known=names_known)
        observers = (
            Findings((note_on_fp64(narrow_operators), *model.notes), model.not_judged),
            Findings(tuple(notes_on_sizes(candidate, model)), doubts=tuple(fixed)),
            findings_on_runner(candidate),
            replace(self.inputs.findings, notes=()) if outputs.refusals else self.inputs.findings,
            outputs.findings,
            Findings(() if self._is_repeated else (NOT_REPEATED,)),
            Findings((note_on_half(),) if is_half and weights.dtype == "float32" else ()),
            *(weights.findings, found.findings, pairs.findings),
        )
        self._expected = ReferenceOutputs(
            own,
            by_role,
            sensitivity,
            dtype=weights.dtype,
            names_known=names_known,
            is_quantised=bool(weights.quantised),
            findings=sum(observers, Findings()),
            unreached=pairs.unreached,
        )
        return self._with_doubts(self._expected)

    def run_alike(self, outputs: CandidateOutputs, step: OnProofStep) -> ReferenceOutputs | None:
        """Run PyTorch and the references with the candidate's choices where scores of a top-k operator tie."""
        assert self._fp64 is not None
        assert self._expected is not None
        reader = None if outputs.refusals else choice_reader(self.weights.candidate)
        if reader is None:
            return None
        attached, cases = self.weights.attached, self.inputs.cases
        deployed = self.deployed
        if self.weights.is_large:  # what is made again for it goes with it
            del self.deployed
            attached.ready = None
        choices = shared_choices(attached, deployed, reader, cases, outputs.by_case, step)
        if choices is None:
            return None
        by_role = choices.run_references(attached, attached.groups if self.weights.adapters else [["reference"]], cases)
        own = choices.run_deployed(deployed, cases)
        self._choices, self._fp64 = choices, replace(self._fp64, choices=choices)
        findings = self._expected.findings + Findings((choices.note,))
        return self._with_doubts(replace(self._expected, deployed=own, by_role=by_role, findings=findings))

    def _with_doubts(self, expected: ReferenceOutputs) -> ReferenceOutputs:
        """With the positions and outputs where PyTorch's own error is more than rounding."""
        unjudged, beyond = self._beyond_rounding(expected.deployed, expected.by_role["reference"])
        return replace(expected, findings=expected.findings + beyond, unjudged=unjudged)

    def _beyond_rounding(self, own: OutputsByCase, reference: OutputsByCase) -> tuple[UnjudgedPositions, Findings]:
        """The positions where PyTorch's own error is more than rounding, and what a verdict reports about it."""
        if self.weights.quantised:  # there PyTorch rounds to int8 as the graph does
            return {}, Findings()
        dtype = self.weights.dtype
        unjudged: UnjudgedPositions = {}
        if self.weights.model.is_huggingface:
            unjudged = padding_beyond_rounding(own, reference, self.inputs.cases, dtype)
        doubts = outputs_beyond_rounding(own, reference, unjudged, dtype)
        return unjudged, Findings(tuple(notes_on_padding(unjudged)), doubts=tuple(doubts))

    def further_peers(self, step: OnProofStep, cases: Sequence[str]) -> Iterator[FurtherPeer]:
        how, inputs = self.settings, {name: self.inputs.cases[name] for name in cases}
        return further_peers(self.weights, lambda: self.deployed, inputs, how.device, how.seed, step, self._choices)

    def control_pairs(self, cases: Sequence[parity.Case], expected: ReferenceOutputs) -> Findings:
        assert self._fp64 is not None
        return self._fp64.control_pairs(cases, expected).findings

    def diagnose(self, case: parity.Case, *, every: bool, step: OnProofStep) -> Diagnosed:
        if self.weights.depend_on_tokens:
            return None, ["modules were not compared: what a layer should give depends on its token"]
        step("comparing modules")
        inputs = self.inputs.cases[case.name]
        return diagnose_module(self.weights, lambda: self.deployed, case, inputs, every=every)


def _is_repeated(runner: ModuleRunner, cases: Mapping[str, Arrays], outputs: OutputsByCase) -> bool:
    """Whether another run of the smallest case returns the same bits."""
    smallest = min(cases, key=lambda name: sum(value.size for value in cases[name].values()))
    again = runner.run(cases[smallest])
    return all(bits(value) == bits(again[name]) for name, value in outputs[smallest].items())
