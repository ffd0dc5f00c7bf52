"""A verdict with what led to it, and what can be judged by proofs and graphs that were there before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_export.runtime.runner import Arrays, Placement
from lora_export.verification import parity
from lora_export.verification.diagnose.root_cause import Diagnosis


@dataclass(frozen=True, eq=False)
class Proof:
    """A verdict with what it takes to trust and to repeat it."""

    verdict: parity.Verdict
    placement: Placement | None  # None where PyTorch itself ran the candidate
    about: Mapping[str, Any]  # versions, seed, adapters, and the inputs' shapes
    inputs: Mapping[str, Arrays] = field(default_factory=dict, repr=False)  # case -> what everybody was given
    cases: tuple[parity.Case, ...] = field(default=(), repr=False)  # and what they made of it
    ended_with: int | None = None  # the exit code of what ended it before anything was measured
    diagnosis: Diagnosis | None = None  # where the candidate goes wrong, and why; or that it nowhere does

    @property
    def exit_code(self) -> int:
        return self.verdict.exit_code if self.ended_with is None else self.ended_with
