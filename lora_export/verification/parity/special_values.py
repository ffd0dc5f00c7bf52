"""What is compared by itself: the fill values of a mask, and indices of scores that tie.

Fill values are -1e4, -1e9, the least float or an infinity, where a model masks an output. They are thousands of times
as large as all other values. A limit that depends on the magnitude of the whole output would allow any error in the
others. So fill values are compared by themselves, and are zero in every run for the gates.

An argmax or a top-k may be either of two whose scores lie within the limits. Scores may be off by as much as the gates
allow. Two that lie closer together may change places in a right candidate. Only where a float output has the scores
can this be judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import count
from lora_export.verification.parity.case import Case
from lora_export.verification.parity.figures import EPS, FEW_EPS, Array, Magnitudes, coarser, difference, is_float, wide
from lora_export.verification.parity.gates import allowance, ratio_limit
from lora_export.verification.parity.verdict import Outcome, Reason

LEAST_FILL = 1e3  # the smallest magnitude of a fill value
GAP = 100  # times as large as the largest other value
SAME_FILL = 0.1  # relative to a fill value: what scores that are added to it may change

Mask = NDArray[np.bool_]


class Prepared(NamedTuple):
    """A case without what was compared by itself, the reasons against the candidate, and what the verdict notes."""

    case: Case
    reasons: Sequence[Reason] = ()
    notes: Sequence[str] = ()


def without_fill(case: Case, dtype: str) -> Prepared:
    """Compare the fill values of a case, and set them to zero in every run. `dtype` is the deployed precision."""
    fills = {name: mask for name in case.reference if (mask := _fill_mask(case, name)) is not None}
    if not fills:
        return Prepared(case)
    reasons = [reason for name, mask in fills.items() for reason in _reasons(case, name, mask, dtype)]
    notes = [
        f"{count(int(mask.sum()), 'value')} of {name} in case {case.name} are fill values of a mask: compared one by "
        "one, and left out of all figures"
        for name, mask in fills.items()
    ]
    cleared: dict[str, Any] = {
        role: {
            name: np.where(fills[name], value.dtype.type(0), value) if name in fills else value
            for name, value in outputs.items()
        }
        for role, outputs in case.by_role.items()
    }
    return Prepared(replace(case, **cleared, filled=frozenset(fills)), reasons, notes)


def _fill_mask(case: Case, output: str) -> Mask | None:
    """Where an output has fill values in the reference; None where it has none, or not one shape in every run."""
    arrays = [outputs[output] for outputs in case.runs.values() if output in outputs]
    reference, deployed = case.reference[output], case.deployed.get(output)
    if deployed is None or not all(is_float(array) and array.shape == reference.shape for array in arrays):
        return None
    mask = fill_mask(reference, deployed)
    return mask if mask.any() and not mask.all() else None


def fill_mask(reference: Array, deployed: Array) -> Mask:
    """Where an output of floats has fill values: finite ones beyond a gap, and infinities that both runs have."""
    magnitude = np.abs(wide(reference))
    infinite = np.isinf(magnitude) & (wide(reference) == wide(deployed))
    mask: Mask = infinite | (np.isfinite(magnitude) & (magnitude >= _least_fill(magnitude)))
    return mask


def _least_fill(magnitude: NDArray[np.float64]) -> float:
    """The smallest fill value: from 1,000 on, beyond a gap of two decades. Infinity where there is no such gap."""
    finite = magnitude[np.isfinite(magnitude) & (magnitude > 0)]
    if not finite.size or finite.max() < LEAST_FILL or finite.max() / GAP < finite.min():
        return np.inf
    ordered = np.sort(finite)
    is_gap = (ordered[1:] / GAP >= ordered[:-1]) & (ordered[1:] >= LEAST_FILL)
    return float(ordered[1:][is_gap][0]) if is_gap.any() else np.inf


def _reasons(case: Case, output: str, fill: Mask, dtype: str) -> Sequence[Reason]:
    """Each fill value is the reference's or the deployed model's, as nearly as the deployed model's are.

    The least float of fp16 is another than that of fp64: such a fill value is compared with the deployed model's alone.
    """
    candidate = case.candidate.get(output)
    if candidate is None:
        return []
    finest = coarser(candidate, dtype)
    own, truth, deployed = (wide(run[output])[fill] for run in (case.candidate, case.reference, case.deployed))
    with np.errstate(invalid="ignore"):  # inf - inf
        peer_errors = np.abs(deployed - truth)
        is_shared = np.isfinite(truth) & (peer_errors <= SAME_FILL * np.abs(truth))
        rounding = FEW_EPS * EPS[finest]
        limit = ratio_limit(own.size, finest) * peer_errors[is_shared].max(initial=0.0) + rounding * np.abs(truth)
        near = is_shared & np.isfinite(own) & (np.abs(own - truth) <= limit)
        near |= np.isfinite(deployed) & (np.abs(own - deployed) <= rounding * np.abs(deployed))
    equal = near | (own == truth) | (own == deployed)
    wrong = np.argwhere(fill)[~equal]
    if not len(wrong):
        return []
    index = tuple(map(int, wrong[0]))
    text = (
        f"{len(wrong)} of {count(int(fill.sum()), 'fill value')} of a mask are not {case.peer}'s: the element at "
        f"{list(case.index(output, index))} is {float(candidate[index]):.9g}, the reference has "
        f"{float(case.reference[output][index]):.9g}"
    )
    return [Reason(Outcome.DIFFERENT, "fill", text, case.name, output)]


# --- indices of scores that tie ---


def without_ties(case: Case, dtype: str) -> Prepared:
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
        return Prepared(case)
    return Prepared(replace(case, candidate={**case.candidate, **changed}), notes=notes)


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
    truth, peer = Magnitudes(wide(values)), Magnitudes(difference(case.deployed[scores], values))
    limit = allowance(truth, peer, ratio_limit=ratio_limit(values.size, finest), eps=EPS[finest]).peak
    found, expected = (np.take_along_axis(wide(values), index, -1) for index in (picked, right))
    ordered = np.sort(picked, axis=-1)
    is_repeated = (ordered[..., 1:] == ordered[..., :-1]).any(-1, keepdims=True)
    tied: NDArray[np.bool_] = (np.abs(found - expected) <= 2 * limit) & ~is_repeated
    return tied.reshape(own.shape)
