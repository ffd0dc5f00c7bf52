"""The outputs of the references in fp64: run once in each role, or those of an earlier proof.

A cache in a folder has all of them, for the next candidate of the same model. A session in memory has those of the
base without adapters, for the next adapter.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_export.runtime.memory import release_memory
from lora_export.runtime.runner import Arrays
from lora_export.verification import parity
from lora_export.verification.candidate_outputs import OnProofStep
from lora_export.verification.module_copies import widened
from lora_export.verification.pair_controls import PairControls
from lora_export.verification.proof_session import ProofSession
from lora_export.verification.references import STEPS, ReferenceOutputs
from lora_export.verification.references.attached_module import RoleOutputs
from lora_export.verification.references.cached_outputs import CachedOutputs, CacheEntry
from lora_export.verification.references.proof_weights import ProofWeights
from lora_export.verification.references.shared_choices import SharedChoices
from lora_export.verification.references.single_pairs import control_pairs


@dataclass(frozen=True, eq=False)
class Fp64References:
    """The model with its adapters attached, in fp64, in every role that a proof compares with."""

    weights: ProofWeights
    cases: Mapping[str, Arrays]
    cache: CacheEntry
    session: ProofSession | None = None
    choices: SharedChoices | None = None  # with which every pair is switched off

    def outputs(self, step: OnProofStep) -> CachedOutputs:
        """The outputs in all roles: read from the cache, or run now and written to it."""
        if cached := self.cache.read():
            return cached
        attached, found = self.weights.attached, dict[str, RoleOutputs]()
        with widened(attached.module):
            for roles in attached.groups if self.weights.adapters else (("reference",),):
                for role in roles:
                    step(STEPS[role])
                found |= self._run(roles)
                if attached.rounding and self.weights.is_large:
                    release_memory()  # of rounded weights
        by_role = {role: own.by_case for role, own in found.items()}
        outputs = CachedOutputs(by_role, frozenset().union(*(own.narrow_operators for own in found.values())))
        self.cache.write(outputs)
        return outputs

    def _run(self, roles: Sequence[str]) -> dict[str, RoleOutputs]:
        """The outputs in these roles; those of the base without adapters are the session's, where it has them."""
        attached, cases = self.weights.attached, self.cases
        if self.session is None or "base" not in roles or any(map(callable, attached.rounding.values())):
            return attached.run(roles, cases)
        settings = {
            "rounding": dict(attached.rounding),
            "has_pairs": attached.has_pairs,
            "candidate": type(self.weights.candidate).__name__,  # some limit the outputs
        }
        result = self.session.without_adapters(attached.module, settings, cases)
        found = attached.run([role for role in roles if role != "base" or result.value is None], cases)
        result.value = found.get("base", result.value)
        assert result.value is not None
        return {**found, "base": result.value}

    def control_pairs(self, cases: Sequence[parity.Case], expected: ReferenceOutputs) -> PairControls:
        """Switch off single pairs. The cache knows those that are detected beside PyTorch as deployed."""
        judge = functools.partial(parity.judge_missing_part, cases, dtype=expected.dtype)
        is_as_cached = not self.choices and all(case.deployed is expected.deployed[case.name] for case in cases)
        cached = self.cache.read() if is_as_cached else None
        detected = cached.detected if cached else frozenset()
        module = self.weights.attached.module
        with widened(module):
            controls = control_pairs(
                module,
                self.cases,
                cases,
                judge,
                skip=frozenset(expected.unreached),
                detected=detected,
                in_case=None if self.choices is None else functools.partial(self.choices.at_ties, module),
            )
        if cached and controls.detected - detected:
            self.cache.write(cached._replace(detected=controls.detected))
        return controls
