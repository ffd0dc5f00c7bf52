"""How far the outputs of a layer are from those of W + s·BA, on held-out inputs. Shares no code with a merge."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from lora_export.verification.parity import Wide


class OutputErrors:
    """The norms of what errors of a weight change in the outputs of its layer, by name, summed over blocks of rows."""

    def __init__(self, held_out: NDArray[np.float32], *, is_transposed: bool):
        self.inputs, self.is_transposed = held_out.astype(np.float64), is_transposed
        self._squares: dict[str, float] = {}
        self._outputs: dict[str, Wide] = {}  # where the rows of a weight are inputs, they add to all outputs

    def add(self, rows: slice, errors: Mapping[str, Wide]) -> None:
        """Add errors of some rows of the weight, as it is stored."""
        for name, error in errors.items():
            if self.is_transposed:
                outputs = self.inputs[:, rows] @ error
                self._outputs[name] = self._outputs[name] + outputs if name in self._outputs else outputs
            else:
                outputs = self.inputs @ error.T
                self._squares[name] = self._squares.get(name, 0.0) + float(np.vdot(outputs, outputs))

    def norm(self, name: str) -> float:
        outputs = self._outputs.get(name)
        return math.sqrt(self._squares[name] if outputs is None else float(np.vdot(outputs, outputs)))
