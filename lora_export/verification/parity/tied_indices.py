"""Indices of scores that tie: an argmax or a top-k may be either of two whose scores lie within the limits.

Scores may be off by as much as the gates allow. Two that lie closer together may change places in a right candidate.
Only where a float output has the scores can this be judged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import count
from lora_export.verification.parity.case import Case
from lora_export.verification.parity.figures import EPS, Array, coarser, difference, is_float, wide
from lora_export.verification.parity.gates import allowance, ratio_limit


@dataclass(frozen=True, eq=False)
class WithoutTies:
    """A case in which tied indices of the candidate are replaced by the reference's, and what the verdict notes."""

    case: Case
    notes: tuple[str, ...] = ()


def without_ties(case: Case, dtype: str) -> WithoutTies:
    """Replace indices of the candidate whose scores tie with the reference's. `dtype` is the deployed precision."""
    changed, notes = {}, []
    for output, reference in case.reference.items():
        own, deployed = case.candidate.get(output), case.deployed.get(output)
        if not _are_indices(reference, own, deployed):
            continue
        assert own is not None and deployed is not None
        wrong = (own != reference) & (own != deployed)
        scores = next(_scores(case, reference), None) if wrong.any() else None
        if scores is not None and (tied := wrong & _tied(case, scores, own, reference, dtype)).any():
            changed[output] = np.where(tied, reference, own).astype(own.dtype)
            notes.append(
                f"{int(tied.sum())} of {count(own.size, 'value')} of {output} in case {case.name} are other indices "
                f"than {case.peer}'s, with the same scores in {scores} within its limits: not counted as wrong"
            )
    if not changed:
        return WithoutTies(case)
    return WithoutTies(replace(case, candidate={**case.candidate, **changed}), tuple(notes))


def _are_indices(reference: Array, own: Array | None, deployed: Array | None) -> bool:
    arrays = (reference, own, deployed)
    return all(array is not None and array.dtype.kind in "iu" and array.shape == reference.shape for array in arrays)


def _scores(case: Case, indices: Array) -> Iterator[str]:
    """The float outputs whose largest values along the last axis are at these indices, in the reference."""
    for name, values in case.reference.items():
        runs = [run.get(name) for run in (case.candidate, case.deployed)]
        if name in case.filled or not is_float(values) or any(run is None or run.shape != values.shape for run in runs):
            continue
        picked = _along_last_axis(values, indices)
        if picked is None or not np.isfinite(values).all():
            continue
        largest = -np.sort(-wide(values), axis=-1)[..., : picked.shape[-1]]
        if np.array_equal(np.take_along_axis(wide(values), picked, -1), largest):
            yield name


def _along_last_axis(values: Array, indices: Array) -> NDArray[np.int64] | None:
    """The indices with the axes of the scores; None where they are no indices of these."""
    if not values.ndim or not indices.size or indices.min() < 0 or indices.max() >= values.shape[-1]:
        return None
    if indices.shape == values.shape[:-1]:
        return indices[..., None].astype(np.int64)
    is_top_k = indices.ndim == values.ndim and indices.shape[:-1] == values.shape[:-1]
    return indices.astype(np.int64) if is_top_k else None


def _tied(case: Case, scores: str, own: Array, reference: Array, dtype: str) -> NDArray[np.bool_]:
    """Where the candidate's index has the score of the reference's index, as nearly as two scores may be off."""
    values = case.reference[scores]
    picked, right = _along_last_axis(values, own), _along_last_axis(values, reference)
    if picked is None or right is None:
        return np.zeros(own.shape, bool)
    finest = coarser(case.candidate[scores], dtype)
    peer_errors = difference(case.deployed[scores], values).ravel()
    limit = allowance(values, peer_errors, ratio_limit=ratio_limit(values.size, finest), eps=EPS[finest]).peak
    found, expected = (np.take_along_axis(wide(values), index, -1) for index in (picked, right))
    ordered = np.sort(picked, axis=-1)
    is_repeated = (ordered[..., 1:] == ordered[..., :-1]).any(-1, keepdims=True)
    tied: NDArray[np.bool_] = (np.abs(found - expected) <= 2 * limit) & ~is_repeated
    return tied.reshape(own.shape)
