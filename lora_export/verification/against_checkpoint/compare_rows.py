"""Some rows of a changed weight against one sum in fp64. The bits of most entries decide them.

V is computed in fp64 for every entry. Whether |M - V| is within half a step of the stored dtype and the bound of a sum
in fp32 needs a second look only where one of these does not show it:

    bf16, fp16    V, rounded to fp32 and then to the stored dtype, has the bits of M. The first rounding moves V by
                  2⁻²⁴ · |V|, which is less than the bound, and the second by half a step.
    fp32, fp64    |M - V| <= 2⁻²² · |V|, which is a part of the bound.

A block with a value that is not finite is compared entry by entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.verification.against_checkpoint.fp64_sums import (
    EVERY_ENTRY,
    FP32_ROUNDOFF,
    Entries,
    Fp64Sum,
    allowed_error,
)
from lora_export.verification.against_checkpoint.stored_tensor import Scratch
from lora_export.verification.parity import Wide

MOST_UNDECIDED = 1 / 8  # of the entries of a block; all together cost less than more of them one by one


@dataclass(frozen=True, eq=False)
class WeightRows:
    """Some rows of a weight, before and after."""

    rows: slice
    before: Wide  # to which something is added
    after: Wide  # M
    stored: NDArray[Any]  # M in its own dtype


@dataclass(frozen=True, eq=False)
class ComparedRows:
    """What a comparison of a block with one sum found. The arrays are valid until the scratch memory is used again."""

    value: Wide  # V
    difference: Wide  # M - V
    off: int  # entries that differ by more than what is allowed
    entries: Entries  # of the flattened block: those whose bits did not decide
    relative: Wide  # |M - V| of these, relative to what is allowed


def compare_rows(block: WeightRows, one: Fp64Sum, scratch: Scratch, *, every_entry: bool = False) -> ComparedRows:
    """Compare a block with a sum. With `every_entry`, no entry is decided by its bits."""
    with np.errstate(over="ignore", invalid="ignore"):  # entries that are off may have any value
        value, bound_of = one.values(block.rows, block.before, scratch)
        difference = np.subtract(block.after, value, out=scratch.array("difference", value.shape))
        entries = EVERY_ENTRY if every_entry else _undecided(block, value, difference, scratch)
        if not isinstance(entries, slice) and not entries.size:
            return ComparedRows(value, difference, 0, entries, np.empty(0))
        distance = np.abs(difference.reshape(-1)[entries])
        allowed = allowed_error(value.reshape(-1)[entries], bound_of(entries), block.stored.dtype)
        relative = np.nan_to_num(distance / allowed, nan=np.inf, posinf=np.inf)
        off = distance.size - int(np.count_nonzero(distance <= allowed))  # NaN is off
    return ComparedRows(value, difference, off, entries, relative)


def _undecided(block: WeightRows, value: Wide, difference: Wide, scratch: Scratch) -> Entries:
    """The entries that may be off; every entry where there are many."""
    flat = difference.reshape(-1)
    if not np.isfinite(flat @ flat):
        return EVERY_ENTRY
    mask = scratch.array("undecided", value.shape, np.bool_)
    if block.stored.dtype.itemsize == 2:
        rounded = scratch.array("rounded", value.shape, block.stored.dtype)
        in_fp32 = scratch.array("fp32", value.shape, np.float32)
        np.copyto(in_fp32, value, casting="unsafe")
        np.copyto(rounded, in_fp32, casting="unsafe")
        np.not_equal(rounded.view(np.uint16), block.stored.view(np.uint16), out=mask)
    else:
        distance, near = (scratch.array(name, value.shape) for name in ("distance", "near"))
        np.multiply(np.abs(value, out=near), 4 * FP32_ROUNDOFF, out=near)
        np.greater(np.abs(difference, out=distance), near, out=mask)
    if np.count_nonzero(mask) > MOST_UNDECIDED * mask.size:
        return EVERY_ENTRY
    return np.flatnonzero(mask)
