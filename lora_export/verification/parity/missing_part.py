"""Whether the gates would detect a candidate that lacks a part of the adapters, and whether this candidate does.

A part whose effect is smaller than the rounding of each single value passes the gates. All values together still show
it: the candidate's error is rounding, and it points in no particular direction. The error of a candidate that lacks
the part contains the part's whole effect D. So <O - R, D> / <D, D>, the share of the effect that is missing, is near 0
or near 1, and how near is known from the same share of PyTorch's own error.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import NamedTuple

import numpy as np

from lora_export.verification.parity.case import Case
from lora_export.verification.parity.figures import EPS, Outputs, coarser, difference, is_float, rms, wide
from lora_export.verification.parity.gates import FEW_ELEMENTS
from lora_export.verification.parity.judging import judge
from lora_export.verification.parity.special_values import without_fill
from lora_export.verification.parity.verdict import Outcome

LARGEST_SHARE = 0.5  # of a part's effect that may be missing
# Standard deviations of the share that its limit is away from 0. The estimate takes the rows of an output for
# independent, and is too small by up to a half where they are not.
SPREADS = 7
ROWS_OF_SPREAD = 20  # from which the spread is estimated
LEAST_ERROR = 0.1  # in eps, relative to the output: what PyTorch is taken to have where it happens to be exact


@dataclass(frozen=True)
class EffectShare:
    """How much of a part's effect the errors of the candidate and of PyTorch contain. All are sums over elements.

    Each output counts in units of PyTorch's own error in it. D is the effect: the outputs without the part minus R.
    """

    candidate: float = 0.0  # Σ (O - R) · D
    peer: float = 0.0  # Σ (P - R) · D
    effect: float = 0.0  # Σ D²
    variance: float = 0.0  # of `peer`: Σ over rows of (Σ (P - R) · D)²
    rows: int = 0

    def __add__(self, other: EffectShare) -> EffectShare:
        return EffectShare(*map(operator.add, astuple(self), astuple(other)))

    @property
    def missing(self) -> float | None:
        """The share of the effect that the candidate lacks, near 0 or 1; None where rounding hides it."""
        if self.rows < ROWS_OF_SPREAD or not self.effect:
            return None
        spread = max(math.sqrt(self.variance), abs(self.peer) / 2) / self.effect
        return self.candidate / self.effect if SPREADS * spread <= LARGEST_SHARE else None


class MissingPart(NamedTuple):
    """What a part of the adapters does to the outputs of one case."""

    changes_outputs: bool  # by more than rounding in fp64
    is_detected: bool  # the gates call outputs without it `different`
    share: EffectShare  # nothing where the gates detect it


def judge_missing_part(cases: Sequence[Case], case: Case, without: Outputs, *, dtype: str) -> MissingPart:
    """Apply the gates to outputs in fp64 that were computed without a part of the adapters, in one of the cases.

    They are rounded to the dtype of PyTorch's outputs, as a candidate's would be. In the other cases the candidate is
    the reference: an output of few elements is judged by PyTorch's error in all of them.
    """
    has_few = any(value.size <= FEW_ELEMENTS for value in case.reference.values())
    probes = [
        _as_candidate(each, without if each is case else each.reference) for each in (cases if has_few else [case])
    ]
    verdict = judge(probes, dtype=dtype, gates_only=True)
    changes = any(figures.effect for comparison, figures in verdict.measured if comparison.case == case.name)
    is_detected = any(reason.outcome is Outcome.DIFFERENT for reason in verdict.reasons)
    return MissingPart(changes, is_detected, EffectShare() if is_detected else _share(case, without, dtype))


def _as_candidate(case: Case, outputs: Outputs) -> Case:
    """The case with these outputs as the candidate's. The adapter's effect is then their distance."""
    candidate = {name: value.astype(case.deployed[name].dtype) for name, value in outputs.items()}
    return replace(case, candidate=candidate, base=outputs, scaled=outputs, attached=None)


def _share(case: Case, without: Outputs, dtype: str) -> EffectShare:
    measured = without_fill(replace(case, base=without, scaled=None, attached=None).judged(), dtype).case
    assert measured.base is not None
    total = EffectShare()
    for name, reference in measured.reference.items():
        own, peer = measured.candidate.get(name), measured.deployed.get(name)
        if own is None or peer is None or not is_float(own) or not own.size or own.shape != reference.shape:
            continue
        effect = difference(measured.base[name], reference)
        errors = difference(peer, reference)
        least = LEAST_ERROR * EPS[coarser(own, dtype)] * rms(wide(reference))
        unit = max(rms(errors), least)
        if not unit or not np.isfinite(effect).all():
            continue
        effect, errors, own_errors = effect / unit, errors / unit, difference(own, reference) / unit
        by_row = (errors * effect).reshape(-1, effect.shape[-1] if effect.ndim else 1).sum(axis=1)
        total += EffectShare(
            float(np.sum(own_errors * effect)),
            float(np.sum(by_row)),
            float(np.sum(np.square(effect))),
            float(np.sum(np.square(by_row))),
            len(by_row),
        )
    return total
