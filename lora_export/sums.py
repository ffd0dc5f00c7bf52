"""Where a merge sums: W + ΔW of one step, ΔW = Σ strength * scale * B @ A, with DoRA's rescaling.

All terms of a weight are summed with each other in fp32, then added to the weight, and the result is rounded once.
Three adapters added one after another in bf16 cost 1.7 times the error.

Two views of a weight occur. `delta` and `summed` use the (out, in, ...) view that pairs use. Functions that take
`rows` use the weight as it is stored, which may be (in, out).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.lora import EVERY_ROW
from lora_export.plan import Step, Term

if TYPE_CHECKING:
    from lora_export.pairs.transforms import WeightTransform

ROWS_AT_ONCE = 4096


def sum_dtype(weight: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in which a weight and its change are summed: fp32, or fp64 for an fp64 weight."""
    return np.dtype(np.float64 if weight == np.float64 else np.float32)


# --- ΔW ------------------------------------------------------------------------------------------


def delta(step: Step, weight: NDArray[Any] | None = None) -> NDArray[np.float32]:
    """ΔW in the (out, in, ...) view, in fp32, before DoRA rescales the sum; of a bias, its shift.

    `weight` has that view. Only a change that follows from it needs it.
    """
    return step.shift if step.shift is not None else _sum_terms(step.terms, EVERY_ROW, weight)


def stored_delta(
    step: Step, rows: slice, weight: NDArray[Any] | None = None, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """ΔW of these rows of the weight as it is stored, in fp32. The array is `out` where that is given and needed.

    `weight` has the rows. Only a change that follows from them needs it.
    """
    return step.shift[rows] if step.shift is not None else _sum_terms(step.stored_terms, rows, weight, out)


def _sum_terms(
    terms: tuple[Term, ...], rows: slice, weight: NDArray[Any] | None, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    first, *others = terms
    if first.pair.needs_weight:  # the only term: no other is allowed beside it
        assert weight is not None
        return cast("WeightTransform", first.pair).change(
            weight.astype(sum_dtype(weight.dtype)), rows, strength=first.strength, out=out
        )
    total = first.pair.delta(rows, strength=first.strength, out=out)
    for term in others:
        total += term.pair.delta(rows, strength=term.strength)
    return total


def squared_row_norms(step: Step) -> NDArray[np.float32]:
    """‖ΔW‖² of each row of the weight as it is stored, without computing ΔW: ‖bA‖² = b AAᵀ bᵀ."""
    if step.shift is not None:
        return np.square(step.shift)
    scaled = [(term.pair, np.float32(term.scale)) for term in step.stored_terms]
    a = np.concatenate([pair.a.reshape(pair.rank, -1) for pair, _ in scaled])  # (all ranks, in * kernel)
    gram, rows = a @ a.T, scaled[0][0].b.shape[0]
    norms = np.empty(rows, np.float32)
    for first in range(0, rows, ROWS_AT_ONCE):  # all rows at once would need three more arrays as large as B
        part = slice(first, first + ROWS_AT_ONCE)
        b = np.concatenate([pair.b[part].reshape(-1, pair.rank) * scale for pair, scale in scaled], axis=1)
        np.einsum("or,or->o", b @ gram, b, out=norms[part])
    return norms


# --- W + ΔW --------------------------------------------------------------------------------------


def summed(step: Step, weight: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The whole sum before it is rounded, and its difference from the weight, both in the (out, in, ...) view.

    The sum has the dtype of `sum_dtype`. Raises InputRefused as `dora_factors` does.
    """
    total = weight.astype(sum_dtype(weight.dtype))
    change: NDArray[Any] = delta(step, weight)
    total += change
    if step.magnitude is not None:
        rescale_outputs(step, total, squared_norms(total))
        change = total - weight
    return total, change


def starting_rows(step: Step, rows: slice, stored: NDArray[Any]) -> NDArray[Any]:
    """The rows to which ΔW is added: those of the base, or those of the tensor that replaces it."""
    if step.replace is None:
        return stored
    return step.replace[rows] if step.replace.shape else step.replace


def sum_rows(
    step: Step,
    rows: slice,
    weight: NDArray[Any],
    total: NDArray[Any],
    *,
    column_norms: NDArray[np.float64] | None = None,
    change: NDArray[np.float32] | None = None,
    known: NDArray[Any] | None = None,
) -> NDArray[np.float32]:
    """Write W + ΔW of these stored rows to `total`; return its difference from the weight, in fp32.

    `weight` holds the rows (see `starting_rows`). `total` is fp32, or fp64 for an fp64 weight. `column_norms` are the
    squared norms of all outputs of W + ΔW, needed for DoRA where outputs are columns of the stored weight. `change` is
    memory for the result. `known` is the change of these rows, where it was computed before. Raises InputRefused as
    `dora_factors` does.
    """
    if known is None:
        change = stored_delta(step, rows, weight, out=change)
    else:
        change = known.reshape(weight.shape).astype(np.float32, copy=False)
    add_into(total, weight, change)
    if step.magnitude is not None:
        if column_norms is not None:
            rescale_outputs(step, total.T, column_norms)
        else:
            rescale_outputs(step, total, squared_norms(total), rows)
        np.subtract(total, weight, out=change, casting="unsafe")
    return change


def add_into(total: NDArray[Any], weight: NDArray[Any], change: NDArray[np.float32]) -> None:
    """Write `weight + change` to `total`, summed in the dtype of `total`."""
    if weight.dtype in (np.float32, np.float64):
        np.add(weight, change, out=total, casting="unsafe")
    else:  # NumPy converts two dtypes in small pieces, which is slower; a shift of integers takes 1.8 times as long
        np.copyto(total, weight)
        total += change


def round_into(out: NDArray[Any], total: NDArray[Any]) -> None:
    """Round a sum to the dtype of `out`, unless it is the sum. Integer arithmetic takes 1.2 times as long for bf16.

    From fp64 to bf16 by way of fp32, as PyTorch does, and ml_dtypes before 0.7: every version makes the same bits.
    """
    if out is not total:
        is_wide = total.dtype == np.float64 and out.dtype == ml_dtypes.bfloat16
        np.copyto(out, total.astype(np.float32) if is_wide else total, casting="unsafe")


# --- DoRA ----------------------------------------------------------------------------------------


def squared_norms(weight: NDArray[Any]) -> NDArray[np.float64]:
    """‖·‖² of each output of a weight in the (out, in, ...) view, summed in fp64."""
    flat = weight.reshape(len(weight), -1).astype(np.float64)
    squares: NDArray[np.float64] = np.einsum("oi,oi->o", flat, flat)
    return squares


def dora_factors(step: Step, squares: NDArray[np.float64], outputs: slice = EVERY_ROW) -> NDArray[np.float64]:
    """m / ‖W + ΔW‖ of these outputs, (outputs,), from their squared norms.

    Raises InputRefused where an output of W + ΔW is zero: a zero vector has no direction to rescale.
    """
    assert step.magnitude is not None
    zeros = squares.size - np.count_nonzero(squares)
    if zeros:
        raise InputRefused(
            f"{step.weight}: {zeros} outputs of W + s·BA are zero, and DoRA cannot rescale a zero vector. Check that "
            "the adapter was trained on this base"
        )
    factors: NDArray[np.float64] = step.magnitude[outputs] / np.sqrt(squares)
    return factors


def rescale_outputs(step: Step, total: NDArray[Any], squares: NDArray[np.float64], outputs: slice = EVERY_ROW) -> None:
    """Give these outputs of W + ΔW, in the (out, in, ...) view, DoRA's length, in place. Raises as `dora_factors`."""
    factors = dora_factors(step, squares, outputs).astype(total.dtype)
    total *= factors.reshape(-1, *[1] * (total.ndim - 1))
