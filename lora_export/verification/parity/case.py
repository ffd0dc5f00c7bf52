"""One set of inputs, and the outputs of every run on it."""

from __future__ import annotations

from dataclasses import dataclass

from lora_export.verification.parity.figures import Outputs
from lora_export.verification.parity.verdict import PYTORCH


@dataclass(frozen=True, eq=False)
class Case:
    """The outputs of all runs on one set of inputs, by output name.

    `candidate` and `deployed` are in the deployed dtype, all others in fp64. `base` and `scaled` are None only
    where there is no adapter at all.

    `attached` is set where the candidate stores its merged weights in a low precision. Then `reference`, `base` and
    `scaled` use weights that are rounded in the same way, and `attached` does not: its distance from `reference` is
    the merge loss. `base` is rounded too, because the rounding of the base's own weights is no effect of the adapter.
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
