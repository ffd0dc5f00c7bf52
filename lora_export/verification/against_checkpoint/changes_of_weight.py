"""T(W) - W in fp64 for the rows of a stored weight, of changes that follow from it, in memory that is bounded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from lora_export.pairs.exact_transforms import OF_OUTPUTS, exact_change, independent_axis
from lora_export.pairs.transforms import WeightTransform
from lora_export.plan import Step
from lora_export.storage.matrix_on_disk import MatrixOnDisk
from lora_export.verification.against_checkpoint.fp64_sums import ChangesOf
from lora_export.verification.parity import Wide

_Sized = tuple[Wide, Wide]


class RowsBefore(Protocol):
    """A weight whose rows are read in pieces."""

    @property
    def step(self) -> Step: ...

    @property
    def pieces(self) -> Sequence[slice]: ...

    def before(self, rows: slice) -> Wide: ...


def changes_of_weight(weight: RowsBefore) -> ChangesOf:
    """T(W) - W and its size, of rows that are in one of the pieces.

    Where the rows change one by one, those of a piece are computed when they are needed. Otherwise the columns do: all
    are computed at once, by way of temporary files of 24 bytes for each entry.
    """
    (pair, is_transposed) = weight.step.terms[0].pair, weight.step.spec.layout.is_transposed
    assert isinstance(pair, WeightTransform)
    transform: WeightTransform = pair

    def changes(own: slice, stored: Wide) -> _Sized:
        change, size = exact_change(transform, stored.T if is_transposed else stored, own)
        return (change.T, size.T) if is_transposed else (change, size)

    axis = independent_axis(transform)
    if axis is not None and (axis == OF_OUTPUTS) is not is_transposed:
        last: list[tuple[slice, _Sized]] = []

        def of_rows(rows: slice) -> _Sized:
            if not last or not last[0][0].start <= rows.start < last[0][0].stop:
                piece = next(each for each in weight.pieces if each.start <= rows.start < each.stop)
                last[:] = [(piece, changes(piece, weight.before(piece)))]
            (piece, (change, size)) = last[0]
            here = slice(rows.start - piece.start, rows.stop - piece.start)
            return change[here], size[here]

        return of_rows

    shape = weight.pieces[-1].stop, math.prod(weight.step.spec.shape) // weight.pieces[-1].stop
    before, change, size = (MatrixOnDisk(shape, np.float64) for _ in range(3))
    for piece in weight.pieces:
        before.write_rows(piece, weight.before(piece).reshape(-1, shape[1]))
    every = slice(0, shape[0])
    for columns in before.column_blocks if axis is not None else ():
        for matrix, values in zip((change, size), changes(columns, before.columns(columns)), strict=True):
            matrix.write_columns(columns, values)
    if axis is None:
        for matrix, values in zip((change, size), changes(every, before[every]), strict=True):
            matrix.write_rows(every, values)
    return lambda rows: (change[rows], size[rows])
