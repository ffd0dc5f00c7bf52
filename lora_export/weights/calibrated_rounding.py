"""Rounding with feedback through the inputs of a layer: the errors of its numbers cancel in its outputs.

The target is T = W + ΔW. Each number Q becomes one of the two values of its grid around T. They are chosen input by
input, in passes: the target of input k is T_k + Σ_i (T_i - Q_i) F_ki. With the second moments H of the inputs, and
H = M D Mᵀ (M upper triangular, with ones on its diagonal), F of the first pass is what Mᵀ has below its diagonal: this
is GPTQ (Frantar et al. 2022), as LDLQ writes it (Chee et al. 2023). F of the others is H_ki / H_kk without its
diagonal: each choice is the better one where all others stay. Outputs are independent of each other, so that a block of
them is rounded by itself. Blocks whose outputs on held-out inputs get no better keep the nearest values.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lora_export.storage.matrix_on_disk import MatrixOnDisk

FITTED, HELD_OUT = 4096, 512  # inputs of a layer that are stored, at most
DAMPING = 0.01  # of the mean second moment, added to each: directions that the calibration lacks
MORE_PASSES = 8  # at most
FEW_CHANGES = 1e-4  # of the numbers: a pass that changes no more is the last
FED_BACK_AT_ONCE = 64  # whose errors are fed back one by one, before those to later inputs follow in one product

_Matrix = NDArray[np.float32]


@dataclass(eq=False)
class StoredInputs:
    """The first rows of what is added, in a temporary file."""

    width: int
    most: int
    count: int = 0
    _stored: MatrixOnDisk = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._stored = MatrixOnDisk((self.most, self.width), np.float32)

    @property
    def is_full(self) -> bool:
        return self.count == self.most

    def add(self, rows: _Matrix) -> None:
        rows = rows[: self.most - self.count]
        self._stored.write_rows(slice(self.count, self.count + len(rows)), rows)
        self.count += len(rows)

    def read(self) -> _Matrix:
        return self._stored[slice(0, self.count)]


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """Inputs of a layer from runs of the model. Raises OutputFailed where their files have no place."""

    fitted: StoredInputs
    held_out: StoredInputs
    is_fed_back: bool = True  # False: only the outputs of the nearest values are measured

    @property
    def passes(self) -> tuple[_Matrix, ...]:
        """F of each pass, (inputs, inputs). Costs (tokens + inputs / 3) · inputs² multiplications; cached."""
        with _ONE_AT_A_TIME:
            return _passes(self) if self.is_fed_back else ()


_ONE_AT_A_TIME = threading.Lock()  # the matrices of a layer are several times as large as its weight


@functools.lru_cache(1)
def _passes(inputs: LayerInputs) -> tuple[_Matrix, ...]:
    rows = inputs.fitted.read()
    moments = (rows.T @ rows).astype(np.float64)
    diagonal = np.einsum("ii->i", moments)
    diagonal += DAMPING * (diagonal.mean() or 1.0)
    upper = np.linalg.cholesky(moments[::-1, ::-1])[::-1, ::-1]  # H = U Uᵀ
    first = np.ascontiguousarray((upper / np.einsum("ii->i", upper)).T, np.float32)
    del upper
    moments /= diagonal.copy()[:, None]
    other = moments.astype(np.float32)
    for one in (first, other):
        np.fill_diagonal(one, 0)
    return first, *[other] * MORE_PASSES


def calibrated(
    inputs: LayerInputs, total: _Matrix, change: _Matrix, nearest: _Matrix, other: _Matrix, *, is_transposed: bool
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Which numbers take `other`, the value on the other side of a sum, in place of the nearest; and `OutputSums`.

    All arrays are (outputs, inputs), for some outputs, or with `is_transposed` (inputs, outputs). `other` is `nearest`
    where there is no choice.
    """
    arrays = (total, change, nearest, other)
    total, change, nearest, other = (np.ascontiguousarray(one if is_transposed else one.T) for one in arrays)
    takes_other = _fed_back(inputs.passes, total, nearest, other)
    rows = inputs.held_out.read()
    effect, plain = rows @ change, rows @ (nearest - total)
    error = rows @ (np.where(takes_other, other, nearest) - total)
    if not np.vdot(error, error) < np.vdot(plain, plain):
        takes_other[...], error = False, plain
    pairs = (effect, effect), (effect, error), (error, error), (effect, plain), (plain, plain)
    sums = np.array([*(np.vdot(*pair) for pair in pairs), np.count_nonzero(takes_other)], np.float64)
    return takes_other if is_transposed else takes_other.T, sums


def _fed_back(passes: tuple[_Matrix, ...], total: _Matrix, nearest: _Matrix, other: _Matrix) -> NDArray[np.bool_]:
    """Which numbers take the other value, all (inputs, outputs)."""
    errors, takes_other = np.zeros_like(total), np.zeros(total.shape, bool)  # T - Q
    for feedback in passes:
        before = takes_other.copy()
        for first in range(0, len(total), FED_BACK_AT_ONCE):
            block = slice(first, first + FED_BACK_AT_ONCE)
            own = feedback[block, block]
            targets = total[block] + feedback[block] @ errors - own @ errors[block]
            for row, weights in enumerate(own, first):
                target = targets[row - first] + weights @ errors[block]
                np.less(np.abs(target - other[row]), np.abs(target - nearest[row]), out=takes_other[row])
                np.subtract(total[row], np.where(takes_other[row], other[row], nearest[row]), out=errors[row])
        if np.count_nonzero(before != takes_other) <= FEW_CHANGES * takes_other.size:
            break
    return takes_other
