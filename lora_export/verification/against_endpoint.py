"""PyTorch as the measure of a served model: the references of a file, rounded as the server rounds, and other tenants.

A server shows no weights and no modules. Where it differs, its answers are compared with those of what servers are
known to serve in place of a model: the base, another adapter, the same adapter in another strength.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from lora_export import layers
from lora_export.graph.cache_names import IDS
from lora_export.lora import Adapter
from lora_export.models.served_values import HALF_CACHE, cache_argument
from lora_export.plan import Term
from lora_export.provenance import adapter_records
from lora_export.runtime.endpoint.runner import IN_BINARY, EndpointRunner
from lora_export.runtime.runner import Arrays, Runner
from lora_export.runtime.torch_runners import Fp64Runner
from lora_export.verification import parity
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.candidate_outputs import CandidateOutputs, OnProofStep
from lora_export.verification.diagnose.diagnosis import Diagnosis
from lora_export.verification.diagnose.root_cause import UNEXPLAINED, Cause, describe_strength, known_factors
from lora_export.verification.inputs import Inputs
from lora_export.verification.module_copies import shared_copy, widened
from lora_export.verification.prepared_pytorch import PreparedPyTorch
from lora_export.verification.references import Diagnosed, FurtherPeer, ReferenceOutputs
from lora_export.verification.references.attached_module import attach_adapters
from lora_export.verification.references.further_peers import peer_in_form

TITLE = "what the server answers as"
AS_BASE = "the server answers as the base model: the adapter's name is accepted, and its weights are not used"
WITH_BEGINNING = "the server puts the token of a beginning (BOS) before tokens that it was sent without one"
SAME_ANSWER = "the server gives the same answer to different prompts, such as from a cache"
OTHER_SHAPE = "the server gives vectors of another size: a layer after the model is left out, or they are cut off"
NOTHING_FITS = (
    "neither the base, nor another strength of the adapter{tenants} explains the answers. Other known causes are "
    "another version of the adapter or the base, quantised weights, and tokens that the server adds or drops"
)
HALF_CACHE_NOTE = (
    "PyTorch was measured with its keys and values rounded to float16, too, as a server's cache may hold them; the "
    "larger error counts"
)
STEPS_TO_FIT = 8  # of a search for the strength that fits
CLOSE_ENOUGH = 1e-6  # relative change of a factor in a step, after which no further one is made


@dataclass(frozen=True, eq=False)
class EndpointReferences(PyTorchReferences):
    """A model whose outputs are what a server gives. `others` are adapters of other tenants."""

    others: Sequence[Adapter] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "others", layers.respelled_for(self.model.module, self.others))

    def prepare(self, candidate: Runner, inputs: Inputs) -> PreparedEndpoint:
        return PreparedEndpoint(super().prepare(candidate, inputs).weights, inputs, self, others=self.others)

    def about(self) -> dict[str, Any]:
        others = {"others": adapter_records(self.others, [1.0] * len(self.others))} if self.others else {}
        return {**super().about(), **others}


@dataclass(eq=False)
class PreparedEndpoint(PreparedPyTorch):
    """The references for one server."""

    others: Sequence[Adapter] = ()  # of other tenants
    changed: Mapping[str, bool] = field(default_factory=dict, init=False)  # as in `CandidateOutputs`

    def run(self, outputs: CandidateOutputs, step: OnProofStep) -> ReferenceOutputs:
        self.changed = outputs.changed
        assert isinstance(self.weights.candidate, EndpointRunner)
        expected, decimals = super().run(outputs, step), self.weights.candidate.decimals
        if decimals >= IN_BINARY:
            return expected
        deployed = {case: _rounded(arrays, decimals) for case, arrays in expected.deployed.items()}
        note = f"the server gives its numbers with {decimals} decimals: PyTorch's were rounded so, too"
        return replace(expected, deployed=deployed, findings=expected.findings + parity.Findings((note,)))

    def further_peers(self, step: OnProofStep, cases: Sequence[str]) -> Iterator[FurtherPeer]:
        if self.weights.dtype == "float32" and cache_argument(type(self.deployed.module)):
            step("PyTorch, its cache in float16")
            module = shared_copy(self.deployed.module)
            setattr(module, HALF_CACHE, True)
            inputs = {name: self.inputs.cases[name] for name in cases}
            yield peer_in_form(module, HALF_CACHE_NOTE, inputs, self.settings.device)
        yield from super().further_peers(step, cases)

    def control_pairs(self, cases: Sequence[parity.Case], expected: ReferenceOutputs) -> parity.Findings:
        alike = (name for name, outputs in self.tenants.items() if _answers_as(cases, outputs, expected.dtype))
        doubts = (
            f"the other tenant {name} gives the same values within the limits: a server that answers as it would pass"
            for name in alike
        )
        return super().control_pairs(cases, expected) + parity.Findings(doubts=tuple(doubts))

    @cached_property
    def tenants(self) -> Mapping[str, Mapping[str, Arrays]]:
        """Other tenant -> case -> outputs in fp64."""
        found = {}
        for other in self.others:
            module = attach_adapters(shared_copy(self.weights.base.module), [other], None)
            with widened(module):
                runner = Fp64Runner(module)
                found[other.name] = {case: runner.run(arrays) for case, arrays in self.inputs.cases.items()}
        return found

    def diagnose(self, case: parity.Case, *, every: bool, step: OnProofStep) -> Diagnosed:  # noqa: ARG002
        step("comparing with other models")
        return Diagnosis(None, self._cause(case), title=TITLE), []

    def _cause(self, case: parity.Case) -> str:
        """What the server answers as, in words."""
        if not self.changed.get(IDS, True):
            return SAME_ANSWER
        if any(array.shape != case.reference[name].shape for name, array in case.candidate.items()):
            return OTHER_SHAPE
        others: dict[str, Mapping[str, parity.Outputs]] = (
            {AS_BASE: {case.name: case.base}} if case.base is not None else {}
        )
        others |= {f"the server answers as the other tenant {name}": runs for name, runs in self.tenants.items()}
        for text, outputs in (*others.items(), *self._with_beginning(case), *self._other_strengths(case)):
            left = _distance(case, outputs[case.name]) / _distance(case, case.reference)
            if left <= UNEXPLAINED or _answers_as([case], outputs, self.weights.dtype):
                return str(Cause("", text, left))
        tenants = f", nor {' nor '.join(self.tenants)}" if self.tenants else ""
        return NOTHING_FITS.format(tenants=tenants)

    def _with_beginning(self, case: parity.Case) -> Iterator[tuple[str, Mapping[str, parity.Outputs]]]:
        """What PyTorch computes with the token of a beginning before each text, which the tokens sent did not have."""
        config: Any = self.weights.base.module.config
        ids = self.inputs.cases[case.name][IDS]
        if isinstance(token := config.get_text_config().bos_token_id, int):
            begun = np.concatenate([np.full_like(ids[:, :1], token), ids], axis=1)
            module = self.weights.attached.module
            with widened(module):
                outputs = Fp64Runner(module).run({IDS: begun})
            # Log-probabilities have one more for the token; a vector is one of the text as a whole.
            own = {name: array[:, array.shape[1] - case.reference[name].shape[1] :] for name, array in outputs.items()}
            yield WITH_BEGINNING, {case.name: own}

    def _other_strengths(self, case: parity.Case) -> Iterator[tuple[str, Mapping[str, parity.Outputs]]]:
        """The strength of the adapter that comes closest to the server's answers, and what PyTorch computes with it."""
        changes = self.weights.changes
        terms = [term for step in (changes.steps if changes else ()) for term in step.terms]
        if terms:
            with widened(self.weights.attached.module):
                factor, outputs = self._fitted(case, terms[0])
            strength = describe_strength(factor, terms[0], several=len({term.adapter for term in terms}) > 1)
            yield f"the server answers as if {strength}", {case.name: outputs}

    def _fitted(self, case: parity.Case, term: Term) -> tuple[float, Arrays]:
        """The factor on all scales that comes closest: a known one, or found from the closest by Gauss and Newton."""
        known = {0.5, 1.0, *(value for value, _ in known_factors(term) if abs(value) <= 1 + term.pair.rank)}
        runs = {factor: self._with_factor(case, factor) for factor in known}
        factor = min(runs, key=lambda each: _distance(case, runs[each]))
        closest = factor, (here := runs[factor])
        for _ in range(STEPS_TO_FIT):
            beside = factor * 1.0001 + 1e-6
            slope = (_flat(self._with_factor(case, beside)) - _flat(here)) / (beside - factor)
            change = float(slope @ (_flat(case.candidate) - _flat(here)) / (slope @ slope or 1.0))
            factor += change
            if not np.isfinite(factor) or abs(factor) > 100 * (1 + term.pair.rank):
                break
            here = self._with_factor(case, factor)
            if _distance(case, here) < _distance(case, closest[1]):
                closest = factor, here
            if abs(change) <= CLOSE_ENOUGH * abs(factor):
                break
        return closest

    def _with_factor(self, case: parity.Case, factor: float) -> Arrays:
        module, by_pairs = self.weights.attached.module, self.weights.attached.has_pairs
        with layers.scale_adapters(module, factor, keep_replaced=by_pairs, in_fp64=True):
            return Fp64Runner(module).run(self.inputs.cases[case.name])


def _rounded(arrays: Arrays, decimals: int) -> Arrays:
    return {name: np.round(array.astype(np.float64), decimals).astype(array.dtype) for name, array in arrays.items()}


def _answers_as(cases: Sequence[parity.Case], outputs: Mapping[str, parity.Outputs], dtype: str) -> bool:
    """Whether the candidate passes the gates of another reference, with PyTorch's own error as it is."""
    judged = [_beside(case, outputs[case.name]) for case in cases if case.candidate]
    return parity.judge(judged, dtype=dtype).outcome is not parity.Outcome.DIFFERENT


def _beside(case: parity.Case, other: parity.Outputs) -> parity.Case:
    """The case with another reference, and PyTorch as far from it as from its own."""
    own: dict[str, Any] = {}
    for name, truth in other.items():
        peer = case.deployed[name]
        own[name] = (truth + (peer.astype(np.float64) - case.reference[name])).astype(peer.dtype)
    return replace(case, reference=other, deployed=own, base=None, scaled=None, attached=None)


def _flat(outputs: parity.Outputs) -> parity.Wide:
    return np.concatenate([array.astype(np.float64).ravel() for array in outputs.values()])


def _distance(case: parity.Case, outputs: parity.Outputs) -> float:
    return parity.rms(_flat(case.candidate) - _flat(outputs))
