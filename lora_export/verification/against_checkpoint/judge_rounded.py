"""Tensors to which nothing is added: those of the base, and those that an adapter replaces, each rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.lora import EVERY_ROW
from lora_export.plan import Step
from lora_export.plan.stored_region import StoredRegion
from lora_export.verification.against_checkpoint.result import AuditedWeight, Fate
from lora_export.verification.against_checkpoint.stored_tensor import Scratch, StoredTensor
from lora_export.verification.parity import Outcome


def judge_rounded(name: str, step: Step | None, base: StoredTensor | None, candidate: StoredTensor) -> AuditedWeight:
    """Compare a tensor bit by bit with that of the base, or with that of the adapter."""
    if step is None and base is not None:
        base, candidate = base.as_matrix, candidate.as_matrix
    scratch, off, elements = Scratch(), 0, 0
    differs = step is None  # whether the tensor of the adapter differs from that of the base
    for rows in candidate.pieces(least=1 if base is None else base.rows_at_once):
        with np.errstate(over="ignore"):
            old = None
            if base is not None:
                old = base.rows(rows, scratch, "base").astype(candidate.dtype, copy=False)
            expected = old if step is None else _replacement(step, rows, old, candidate.dtype)
        assert expected is not None
        differs = differs or old is None or _count_other_bits(old, expected) > 0
        stored = candidate.rows(rows, scratch, "candidate")
        off += _count_other_bits(stored, expected)
        elements += stored.size
    if not off:
        controls = {} if step is None else {"base": differs}
        return AuditedWeight(name, Fate.of(step), Outcome.SAME, elements=elements, controls=controls)
    why = f"{off:,} of {elements:,} entries are not the {'base' if step is None else 'adapter'}'s"
    return AuditedWeight(name, Fate.of(step), Outcome.DIFFERENT, why, elements, off)


def judge_rest(name: str, parts: Sequence[StoredRegion], base: StoredTensor, candidate: StoredTensor) -> AuditedWeight:
    """Compare bit by bit what is outside of these parts of a tensor with the base."""
    shape = parts[0].shape
    whole = StoredRegion(name, shape, slice(0, shape[0]))
    before, after = base.part(whole), candidate.part(whole)
    scratch, off, elements = Scratch(), 0, 0
    is_changed = np.zeros(shape[0], bool)  # rows that are a part, or of one, from end to end
    for part in parts:
        is_changed[part.rows] |= part.columns == EVERY_ROW
    for rows in after.pieces(least=base.as_matrix.rows_at_once):
        if is_changed[rows].all():
            continue
        with np.errstate(over="ignore"):
            expected = before.rows(rows, scratch, "base").astype(after.dtype, copy=False)
        is_outside = np.ones(expected.shape, bool)
        for part in parts:
            first, last = (min(max(edge - rows.start, 0), len(expected)) for edge in (part.rows.start, part.rows.stop))
            is_outside[first:last, *(() if len(shape) == 1 else (part.columns,))] = False
        same = _equal_bits(after.rows(rows, scratch, "candidate"), expected)
        off += int(np.count_nonzero(~same & is_outside))
        elements += int(np.count_nonzero(is_outside))
    outcome = Outcome.DIFFERENT if off else Outcome.SAME
    why = f"{off:,} of the {elements:,} entries outside of the parts that change are not the base's" if off else ""
    return AuditedWeight(f"{name} (other entries)", Fate.KEPT, outcome, why, elements, off)


def _replacement(step: Step, rows: slice, old: NDArray[Any] | None, dtype: np.dtype[Any]) -> NDArray[Any]:
    """These rows of the tensor with the values of the adapter."""
    whole = old if step.replace is None else np.atleast_1d(step.replace)[rows]
    assert whole is not None
    table = whole.astype(dtype)
    if step.token_rows is not None:
        for index, values in zip(step.token_rows.indices.tolist(), step.token_rows.values, strict=True):
            if rows.start <= index < rows.stop:
                table[index - rows.start] = values.astype(dtype)
    return table


def _count_other_bits(one: NDArray[Any], other: NDArray[Any]) -> int:
    """How many entries differ in a bit. Entries that all agree are compared eight bytes at a time."""
    if one.nbytes % 8 == 0 and one.flags.c_contiguous and other.flags.c_contiguous:
        words, others = (each.reshape(-1).view(np.uint64) for each in (one, other))
        if np.array_equal(words, others):
            return 0
    return one.size - int(np.count_nonzero(_equal_bits(one, other)))


def _equal_bits(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.bool_]:
    """Entry by entry, to the last bit; a NaN equals one of the same bits."""
    kind = f"u{one.dtype.itemsize}" if one.dtype.itemsize in (1, 2, 4, 8) else one.dtype
    return np.asarray(np.ascontiguousarray(one).view(kind) == np.ascontiguousarray(other).view(kind))
