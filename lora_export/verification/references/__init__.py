"""The references of a proof: what computes the outputs that a candidate should have.

`References` and `PreparedReferences` are all that `prove` (verification/proof.py) needs of them. PyTorch and graphs
are both, in `against_pytorch.py` and `against_graph.py`. What has a body here is true unless they differ.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from lora_export.lora import Adapter
from lora_export.runtime.runner import Arrays, Runner
from lora_export.verification import parity
from lora_export.verification.candidate_outputs import CandidateOutputs, OnProofStep
from lora_export.verification.diagnose.diagnosis import Diagnosis
from lora_export.verification.inputs import Inputs

Diagnosed = tuple[Diagnosis | None, list[str]]  # and notes

# Role of a reference -> the step of a proof in which it runs.
STEPS = {
    "reference": "the reference",
    "base": "the base without adapters",
    "scaled": "the reference with scale × 1.1",
    "attached": "the reference with unrounded weights",
}


class References(Protocol):
    """A model with adapters, by which candidates are measured. No method changes it."""

    @property
    def adapters(self) -> Sequence[Adapter]: ...
    @property
    def strengths(self) -> Sequence[float] | None: ...  # one per adapter; None: 1 each
    @property
    def seed(self) -> int: ...  # of the generated inputs
    @property
    def origin(self) -> Path | None:  # the quantised graph from which the candidate was made, where known
        return None

    @property
    def remedy(self) -> str:  # other references that may decide what these cannot
        return ""

    def with_adapters(self, adapters: Sequence[Adapter], strengths: Sequence[float] | None = None) -> Self:
        """The same references with other adapters. What was computed without adapters is shared."""

    def as_run(self, runner: Runner) -> Runner:
        """The runner that runs a graph on the inputs of these references: a graph's own include a cache."""
        return runner

    def inputs(self, candidate: Runner) -> Inputs:
        """The inputs for candidate and references. Raises InputRefused where none can be made."""

    def reaching(self, candidate: Runner, unreached: Collection[str]) -> Self | None:  # noqa: ARG002
        """The references with further inputs that reach some of these pairs.

        None where none is found, and for a graph, of which it is not known what pairs it computes.
        """
        return None

    def prepare(self, candidate: Runner, inputs: Inputs) -> PreparedReferences:
        """The references for one candidate. Raises MatchError where the adapters do not fit the model."""

    def explain(self, refusal: str) -> str:
        """The message for a candidate that refuses all inputs; `refusal` is its first error."""
        return refusal

    def about(self) -> dict[str, Any]:
        """Versions, and the source and hash of the model, for the record of the proof."""


class PreparedReferences(Protocol):
    """References for one candidate and its inputs."""

    def run(self, outputs: CandidateOutputs, step: OnProofStep) -> ReferenceOutputs:
        """Run the references, one after the other."""

    def run_alike(self, outputs: CandidateOutputs, step: OnProofStep) -> ReferenceOutputs | None:  # noqa: ARG002
        """Run them with the candidate's choices where scores of a top-k operator tie; None where nothing changes."""
        return None

    def further_peers(self, step: OnProofStep, cases: Sequence[str]) -> Iterator[FurtherPeer]:
        """Run the deployed model on these cases in other forms, whose error is as legitimate as its own, one by one.

        The outputs of a case do not depend on the other cases.
        """

    def control_pairs(self, cases: Sequence[parity.Case], expected: ReferenceOutputs) -> parity.Findings:
        """Switch off single pairs of the adapters, which `run` has run."""

    def diagnose(self, case: parity.Case, *, every: bool, step: OnProofStep) -> Diagnosed:  # noqa: ARG002
        """Find the first module that differs in a case. Returns notes, too, and None where nothing is compared.

        With `every`, all modules are compared. Raises nothing: no failure here changes a verdict.
        """
        return None, []


@dataclass(frozen=True, eq=False)
class ReferenceOutputs:
    """The outputs of all references, with what the verdict reports about them."""

    deployed: Mapping[str, Arrays]  # case -> outputs of the peer, in its own dtype
    by_role: Mapping[str, Mapping[str, Arrays]]  # reference, base, scaled, attached -> case -> outputs in fp64
    sensitivity: tuple[parity.Sensitivity, ...]
    dtype: str  # in which the candidate is deployed
    peer: str = parity.PYTORCH  # the name of what computed `deployed`
    names_known: bool = True  # False: only the order of the outputs identifies them
    is_quantised: bool = False  # the candidate has quantised weights, which fp64 may be unable to decide
    findings: parity.Findings = field(default_factory=parity.Findings)
    unreached: tuple[str, ...] = ()  # pairs that no input reaches, by the adapter's names of their modules
    # Case -> output -> positions, bool [batch, sequence], that cannot be judged
    unjudged: Mapping[str, Mapping[str, NDArray[np.bool_]]] = field(default_factory=dict)


class FurtherPeer(NamedTuple):
    """The outputs of the peer in another form, and the note for a verdict that rests on them."""

    outputs: Mapping[str, Arrays]  # by case
    note: str
    farthest: float = math.inf  # an error above so many times that of the other peers does not count


def note_on_fp64(narrow_operators: Collection[str]) -> str:
    """The note on a reference in fp64; `narrow_operators` computed in less."""
    if not narrow_operators:
        return "the reference ran in fp64 throughout"
    return f"the reference ran in fp64, except for: {', '.join(sorted(narrow_operators))}"
