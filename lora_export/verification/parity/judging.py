"""Compare a candidate's outputs with the reference: `same`, `different`, or `undecided`.

A fixed tolerance cannot decide it: 1e-3 is the size of a GPU's rounding *and* of a weak adapter's effect. The
verdict uses up to five arrays for each output, all computed from the same inputs:

    O  the candidate, which is judged
    R  the reference: adapters attached, in fp64
    P  the peer: PyTorch as deployed, in the precision in which it will run, adapters attached or, where that is
       less exact, merged; for a graph that is judged against its own base, that base with the adapters in another way
    B  the base: the reference without its adapters
    S  the reference with every adapter scale × 1.1

The gates are listed in `gates.py`. The controls must fail error, tail or bulk for O against B, and for O against S.
"As close to the truth as PyTorch itself" is the rule of PyTorch's own compiler tests (torch._dynamo.utils.same).
`different` outweighs `undecided`. Only a set of cases without any reason against it is `same`. This package knows
arrays alone, neither torch nor onnxruntime.

A part of the adapters whose effect is smaller than the rounding of each single value passes the gates. All values
together still show whether the candidate lacks it: the candidate's error is rounding, and it points in no particular
direction. The error of a candidate that lacks the part contains the part's whole effect D. So <O - R, D> / <D, D>, the
share of the effect that is missing, is near 0 or near 1, and how near is known from the same share of PyTorch's own
error.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import NamedTuple

import numpy as np

from lora_export.errors import InputRefused
from lora_export.options.proof import Running
from lora_export.verification.parity.case import Case, structure_reasons
from lora_export.verification.parity.figures import (
    EPS,
    PYTORCH,
    Figures,
    Histogram,
    Magnitudes,
    Outputs,
    coarser,
    cosine,
    difference,
    effect_of,
    histogram,
    is_class_scores,
    is_float,
    kl_divergence,
    max_relative,
    ratio,
    rms,
    top1_agreement,
    wide,
    worst_element,
)
from lora_export.verification.parity.gates import (
    FEW_ELEMENTS,
    Tolerance,
    allowance,
    controls_of,
    gates_of,
    ratio_limit,
    small_feature_reasons,
)
from lora_export.verification.parity.reasons import input_reasons, notes_on_scope, power_reasons, reasons_of
from lora_export.verification.parity.special_values import without_fill, without_ties
from lora_export.verification.parity.verdict import (
    Comparison,
    Findings,
    Outcome,
    Reason,
    Sensitivity,
    Verdict,
    outcome_of,
)

PADDED = "outputs before a row's first token were not judged: these positions attend to nothing"
NOT_COUNTED = Histogram(0, (), 0)
DEPLOYED_DTYPES = ("float32", "float16", "bfloat16")  # a reference in fp64 is finer than each of these


def judge(
    cases: Sequence[Case],
    *,
    dtype: str = Running.dtype,
    sensitivity: Sequence[Sensitivity] = (),
    atol: float | None = None,
    rtol: float | None = None,
    findings: Findings | None = None,
    gates_only: bool = False,
) -> Verdict:
    """Apply every gate and control to every output of every case.

    `dtype` is the precision in which the model is deployed. An output of a coarser dtype is measured by its own.
    `atol` and `rtol` are an additional requirement and never relax a gate. `findings` become the verdict's.
    With `gates_only`, figures that no gate needs are left out, and so are the controls.

    Raises InputRefused for a dtype that is not in DEPLOYED_DTYPES, and for a tolerance that is negative or not finite.
    """
    if dtype not in DEPLOYED_DTYPES:
        raise InputRefused(
            f"parity in {dtype} cannot be judged by a float64 reference; deploy in {', '.join(DEPLOYED_DTYPES)}"
        )
    found = findings or Findings()
    prepared = [without_fill(case.judged(), dtype) for case in cases]
    untied = [without_ties(each.case, dtype) for each in prepared]
    judged = zip(cases, untied, strict=True)
    is_padded = any(given.unjudged is not None and each.case.positions for given, each in judged)
    cases = [each.case for each in untied]
    tolerance = None if atol is None and rtol is None else Tolerance(atol or 0.0, rtol or 0.0)
    peer = cases[0].peer if cases else PYTORCH
    adapted = any(case.base is not None or case.scaled is not None for case in cases)
    comparisons = _without_unreached_loss(
        [
            _compare(case, output, cases, dtype=dtype, adapted=adapted, tolerance=tolerance, gates_only=gates_only)
            for case in cases
            for output in case.outputs
        ]
    )
    reasons = (
        *(reason for each in prepared for reason in each.reasons),
        *(reason for comparison in comparisons for reason in comparison.reasons),
        *small_feature_reasons(cases, comparisons, dtype),
        *power_reasons(cases, comparisons, adapted=adapted),
        *input_reasons(sensitivity, peer),
        *(Reason(Outcome.UNDECIDED, "inputs", doubt) for doubt in found.doubts),
        *(Reason(Outcome.DIFFERENT, "weights", fault) for fault in found.faults),
    )
    return Verdict(
        outcome=outcome_of(reasons),
        reasons=reasons,
        comparisons=comparisons,
        sensitivity=tuple(sensitivity),
        dtype=dtype,
        notes=(
            *found.notes,
            *([PADDED] if is_padded else []),
            *(note for each in (*prepared, *untied) for note in each.notes),
            *notes_on_scope(comparisons, sensitivity, peer, adapted=adapted),
        ),
        not_judged=found.not_judged,
        peer=peer,
    )


def _compare(
    case: Case,
    output: str,
    cases: Sequence[Case],
    *,
    dtype: str,
    adapted: bool,
    tolerance: Tolerance | None,
    gates_only: bool,
) -> Comparison:
    faults = structure_reasons(case, output, adapted=adapted)
    if faults or case.reference[output].size == 0:
        return Comparison(case.name, output, reasons=tuple(faults))
    measured = [case]
    if case.reference[output].size <= FEW_ELEMENTS:
        measured = [
            other
            for other in cases
            if output in other.outputs and not structure_reasons(other, output, adapted=adapted)
        ]
    by_case = [difference(each.deployed[output], each.reference[output]) for each in measured]
    own = Magnitudes(by_case[measured.index(case)])
    peer = own if measured == [case] else Magnitudes(np.concatenate([errors.ravel() for errors in by_case]))
    figures = _measure(case, output, own, peer, dtype=dtype, tolerance=tolerance, gates_only=gates_only)
    return Comparison(case.name, output, figures, tuple(reasons_of(case.name, output, figures)))


def _without_unreached_loss(comparisons: Sequence[Comparison]) -> tuple[Comparison, ...]:
    """Without the loss gate where no pair reaches an output that one reaches in another case.

    What rounding costs there is that of tensors that an adapter replaces: they are in the base, too. An example is a
    head, and pairs of queries in texts of one token.
    """
    reached = {each.output for each in comparisons if each.figures and each.figures.effect}
    return tuple(_without_loss(each) if each.output in reached else each for each in comparisons)


def _without_loss(comparison: Comparison) -> Comparison:
    """The comparison as it is where a pair has an effect, and elsewhere without the loss gate."""
    if (figures := comparison.figures) is None or figures.effect:
        return comparison
    figures = replace(figures, gates=tuple(gate for gate in figures.gates if gate.name != "loss"))
    reasons = tuple(reasons_of(comparison.case, comparison.output, figures))
    return replace(comparison, figures=figures, reasons=reasons)


def _measure(
    case: Case,
    output: str,
    deployed: Magnitudes,
    peer: Magnitudes,
    *,
    dtype: str,
    tolerance: Tolerance | None,
    gates_only: bool,
) -> Figures:
    """Every figure, gate and control of one output. All runs have it, finite and in one shape.

    `deployed` are PyTorch's errors in it, and `peer` those of all cases by which it is judged.
    """
    o, r, p = case.candidate[output], case.reference[output], case.deployed[output]
    base, scaled = (None if run is None else run[output] for run in (case.base, case.scaled))
    truth, errors = Magnitudes(wide(r)), Magnitudes(difference(o, r))
    change = None if base is None else Magnitudes(difference(r, base))
    effect = None if change is None else effect_of(change, truth, r.dtype.name)
    loss = None if case.attached is None else rms(difference(r, case.attached[output]))
    has_classes = not gates_only and is_class_scores(output, o) and output not in case.filled
    counted = (lambda _: NOT_COUNTED) if gates_only else histogram
    finest, worst = coarser(o, dtype), worst_element(o, r, errors.values)
    allowed = None
    if is_float(o):
        allowed = allowance(truth, peer, ratio_limit=ratio_limit(o.size, finest), eps=EPS[finest])
    return Figures(
        dtype=o.dtype.name,
        shape=o.shape,
        ratio_limit=allowed.ratio_limit if allowed else 0.0,
        error=errors.rms,
        deployed_error=deployed.rms,
        ratio=ratio(errors.rms, deployed.rms),
        max_error=errors.peak,
        deployed_max_error=deployed.peak,
        max_relative_error=None if gates_only else max_relative(errors.values, truth.values),
        worst=replace(worst, index=case.index(output, worst.index)),
        effect=effect,
        relative_to_effect=ratio(errors.rms, effect),
        cosine=None if gates_only else cosine(Magnitudes(wide(o)), truth),
        top1=top1_agreement(o, r, p) if has_classes else None,
        kl=kl_divergence(o, r) if has_classes else None,
        merge_loss=ratio(loss, effect),
        errors=counted(errors.values),
        deployed_errors=counted(deployed.values),
        effects=None if change is None else counted(change.values),
        gates=tuple(gates_of(o, r, p, errors, allowed=allowed, effect=effect, loss=loss, tolerance=tolerance)),
        controls=()
        if gates_only
        else tuple(controls_of(o, r, base, scaled, dtype=finest, allowed=allowed, effect=effect, tolerance=tolerance)),
        peer=case.peer,
    )


# --- a candidate that lacks one part ---

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
