"""Inputs for a proof: from a model, from a graph alone, and whether they reach an adapter's rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lora_export.runtime.runner import Arrays
from lora_export.verification.parity import Findings

REDRAWS = 5  # draws of an input before it counts as one that cannot be varied
NOT_VARIED = "the input {} has a single value: its effect was not tested"


@dataclass(frozen=True, eq=False)
class Inputs:
    """The inputs of a proof: cases, and one of them with each input drawn again.

    `perturbed` maps an input's name to the arrays of `varied` in which this input alone differs.
    """

    cases: Mapping[str, Arrays]
    varied: Arrays = field(default_factory=dict)  # the arrays of one case
    perturbed: Mapping[str, Arrays] = field(default_factory=dict)
    # Case -> bool [batch, sequence]: positions whose outputs are not judged, since a row's tokens begin later.
    unjudged: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    findings: Findings = field(default_factory=Findings)  # doubts are what these inputs cannot show

    @property
    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Case -> input -> shape."""
        return {case: {name: array.shape for name, array in arrays.items()} for case, arrays in self.cases.items()}

    def values(self, case: str) -> int:
        """How many values the inputs of a case have."""
        return sum(array.size for array in self.cases[case].values())

    @property
    def summaries(self) -> dict[str, str]:
        """Case -> names, dtypes and shapes, such as `input_ids int64 [2, 7]`."""
        return {
            case: ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in arrays.items())
            for case, arrays in self.cases.items()
        }
