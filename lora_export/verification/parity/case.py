"""One set of inputs, and the outputs of every run on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

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

    `unjudged` are positions whose outputs mean nothing: a decoder attends to nothing before a row's first token, and
    with a cache it computes other numbers there than without. They are left out of every figure (`judged`), and so are
    those of `unjudged_by_output`, in these outputs alone.
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
    filled: frozenset[str] = frozenset()  # the outputs whose fill values are set to zero, see `fill_values`
    positions: Mapping[str, NDArray[np.intp]] = field(default_factory=lambda: MappingProxyType({}))  # see `judged`

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
        runs = ("reference", "deployed", "candidate", "base", "scaled", "attached")
        by_run: dict[str, Outputs | None] = {run: getattr(self, run) for run in runs}
        reduced: dict[str, Any] = {
            run: {name: value[judged[name]] if name in judged else value for name, value in outputs.items()}
            for run, outputs in by_run.items()
            if outputs is not None
        }
        positions = {name: np.argwhere(mask) for name, mask in judged.items()}
        return replace(self, **reduced, unjudged=None, unjudged_by_output={}, positions=positions)

    def _judged_positions(self, output: str) -> NDArray[np.bool_] | None:
        """Bool (batch, sequence); None where the output has other axes, or not the same shape in every run."""
        arrays = [outputs[output] for outputs in self.runs.values() if output in outputs]
        shape = self.reference[output].shape
        given = (self.unjudged, self.unjudged_by_output.get(output))
        unjudged = [positions for positions in given if positions is not None and positions.shape == shape[:2]]
        if len(shape) <= 2 or not unjudged or any(array.shape != shape for array in arrays):
            return None
        finite = np.all([np.isfinite(array).reshape(*shape[:2], -1).all(-1) for array in arrays], axis=0)
        judged: NDArray[np.bool_] = ~(np.any(unjudged, axis=0) & finite)
        return judged

    def index(self, output: str, index: tuple[int, ...]) -> tuple[int, ...]:
        """The index of an element in the output as it was computed, where positions were left out."""
        if output not in self.positions:
            return index
        return (*map(int, self.positions[output][index[0]]), *index[1:])
