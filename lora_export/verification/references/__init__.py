"""The references of a proof: what computes the outputs that a candidate should have.

`prove` (verification/proof.py) needs no more of them than `References` and `PreparedReferences`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

from lora_export.lora import Adapter
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import Arrays, Runner
from lora_export.verification import parity
from lora_export.verification.candidate_outputs import CandidateOutputs, Step
from lora_export.verification.diagnose.diagnosis import Diagnosis
from lora_export.verification.inputs import Inputs

Diagnosed = tuple[Diagnosis | None, list[str]]  # and notes


class References(Protocol):
    """A model with adapters, as the measure of candidates. No method changes it."""

    @property
    def adapters(self) -> Sequence[Adapter]: ...
    @property
    def strengths(self) -> Sequence[float] | None: ...  # one per adapter; None: 1 each
    @property
    def seed(self) -> int: ...  # of the generated inputs
    @property
    def origin(self) -> Path | None: ...  # the quantised graph from which the candidate was made, where known

    def with_adapters(self, adapters: Sequence[Adapter], strengths: Sequence[float] | None = None) -> Self:
        """The same references with other adapters. Inputs and outputs that do not depend on adapters are shared."""

    def check(self) -> None:
        """Raise what makes every proof impossible, before there is a candidate."""

    def as_run(self, runner: OnnxRunner) -> Runner:
        """A graph as it runs on the inputs of these references."""

    def inputs(self, candidate: Runner) -> Inputs:
        """The inputs for candidate and references. Raises InputRefused where none can be made."""

    def prepare(self, candidate: Runner, inputs: Inputs) -> PreparedReferences:
        """Lay the adapters against the model. Runs nothing that is judged. Raises MatchError where they do not fit."""

    def explain(self, refusal: str) -> str:
        """The message for a candidate that runs on none of the inputs."""

    def about(self) -> dict[str, Any]:
        """Versions, and the source and hash of the model: what it takes to repeat the proof."""


class PreparedReferences(Protocol):
    """References for one candidate and its inputs."""

    def run(self, outputs: CandidateOutputs, step: Step) -> ReferenceOutputs:
        """Run the references, one after the other."""

    def run_merged(self, step: Step) -> MergedPeer | None:
        """Run the deployed model with its adapters merged; None where that is no other computation."""

    def diagnose(self, case: parity.Case, *, every: bool, step: Step) -> Diagnosed:
        """The first module that differs in a case, and notes; None where modules cannot be compared."""


@dataclass(frozen=True, eq=False)
class ReferenceOutputs:
    """The outputs of all references, and what a verdict must know of how they were made."""

    deployed: Mapping[str, Arrays]  # case -> outputs of the peer, in the deployed dtype
    by_role: Mapping[str, Mapping[str, Arrays]]  # reference, base, scaled, attached -> case -> outputs in fp64
    sensitivity: tuple[parity.Sensitivity, ...]
    dtype: str  # of the deployed model
    peer: str = parity.PYTORCH  # what computed `deployed`
    names_known: bool = True  # whether the outputs' names mean something, or only their order does
    is_quantised: bool = False  # whether the candidate's weights are: fp64 may be unable to decide it
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()  # make a verdict undecided
    faults: tuple[str, ...] = ()  # make a verdict different


class MergedPeer(NamedTuple):
    """The outputs of the deployed model with its adapters merged, by case, and the note on a verdict that uses them."""

    outputs: Mapping[str, Arrays]
    note: str
