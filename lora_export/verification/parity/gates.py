"""The gates of a verdict: the checks that each output must pass, and the controls, which must fail them.

    error      rmse(O, R) <= k · rmse(P, R)                      different
    tail       max |O - R| <= k · max |P - R| + 4 eps max |R|    different
    bulk       median |O - R| <= k · median |P - R|              different
    features   error, for features that are small beside others  different
    exact      integers and booleans equal R's or P's            different
    tolerance  |O - R| <= atol + rtol · |R|                      different
    effect     rmse(O, R) <= 0.1 · rmse(R, B)                    undecided
    loss       rmse(R, unrounded R) <= rmse(R, B)                undecided

O is the candidate, R the reference, P the peer (PyTorch as deployed), B the reference without adapters, k the ratio
limit. Other gates: structure (`case.py`), fill (`special_values.py`), inputs and nothing (`reasons.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lora_export.errors import InputRefused, count
from lora_export.verification.parity.case import Case
from lora_export.verification.parity.figures import (
    EPS,
    FEW_EPS,
    LEAST_SQUARED,
    Array,
    Control,
    Gate,
    Magnitudes,
    Wide,
    coarser,
    difference,
    is_float,
    rms,
    wide,
)
from lora_export.verification.parity.verdict import Comparison, Outcome, Reason

FEW_ELEMENTS = 10
LARGEST_ERROR = 0.1  # relative to the adapter's effect
LARGEST_LOSS = 1.0  # relative to the adapter's effect: what rounding the weights may cost
SPIKED = 10  # rms / median of PyTorch's error above which a few elements hold most of it
# The factor on every value in the control of an output without an adapter. One step of bfloat16 is 0.8 %.
CONTROL_VALUE_FACTOR = 1.01
CONTROL_VALUE_FACTOR_OF = {"bfloat16": 1.1}


@dataclass(frozen=True)
class Tolerance:
    """The classical |O - R| <= atol + rtol · |R|. The user may require it in addition to the gates."""

    atol: float
    rtol: float

    def __post_init__(self) -> None:
        for name, value in (("atol", self.atol), ("rtol", self.rtol)):
            if not 0 <= value < math.inf:
                raise InputRefused(f"{name} is {value}; a tolerance must be finite and not negative")


@dataclass(frozen=True)
class Allowance:
    """How far an output may be from the reference: `ratio_limit` times as far as PyTorch itself."""

    ratio_limit: float
    rmse: float
    peak: float
    median: float | None = None  # of |O - R|; None where PyTorch's rmse describes most of its elements


def ratio_limit(elements: int, dtype: str) -> float:
    """The allowed multiple of PyTorch's own error: 2, or 3 in half precision.

    It is 8 or 10 for an output of few elements, whose rmse is itself a matter of chance.
    """
    if elements <= FEW_ELEMENTS:
        return 10.0
    if elements <= 500:
        return 8.0
    return 2.0 if EPS[dtype] <= EPS["float32"] else 3.0


def allowance(truth: Magnitudes, peer: Magnitudes, *, ratio_limit: float, eps: float) -> Allowance:
    """The limits of an output. They depend on R and PyTorch's errors P - R alone, not on the candidate.

    With ten elements or fewer, `peer` holds the errors of this output in all cases. From a single element
    PyTorch would sometimes be exact by luck, and the candidate be blamed for it: in 7 % of all right candidates,
    measured on normal errors with a limit of 10.
    """
    floor = eps * truth.rms  # for a P that happens to be exact
    is_spiked = peer.values.size > FEW_ELEMENTS and peer.are_spiked(SPIKED)
    return Allowance(
        ratio_limit,
        rmse=max(ratio_limit * peer.rms, floor),
        peak=ratio_limit * peer.peak + FEW_EPS * eps * truth.peak,
        median=max(ratio_limit * peer.median, floor) if is_spiked else None,
    )


def gates_of(
    o: Array,
    r: Array,
    p: Array,
    errors: Magnitudes,
    *,
    allowed: Allowance | None,
    effect: float | None,
    loss: float | None,
    tolerance: Tolerance | None,
) -> Iterator[Gate]:
    """Every gate that applies to an output, whose `errors` are O - R. `allowed` is None for integers and booleans."""
    if allowed is None:
        yield exact_gate(o, r, p)
        return
    yield error_gate(errors, allowed)
    yield tail_gate(errors, allowed)
    if allowed.median is not None:
        yield bulk_gate(errors, allowed)
    if effect:
        yield effect_gate(errors, effect)
    if loss is not None:
        yield gate_of("loss", loss, LARGEST_LOSS * (effect or 0.0))
    if tolerance:
        yield tolerance_gate(errors, r, tolerance)


def error_gate(errors: Magnitudes, allowed: Allowance) -> Gate:
    """Is the candidate as close to the reference as PyTorch is?"""
    return gate_of("error", errors.rms, allowed.rmse)


def tail_gate(errors: Magnitudes, allowed: Allowance) -> Gate:
    """Is every single element? An rmse does not show one bad element in a million."""
    return gate_of("tail", errors.peak, allowed.peak)


def bulk_gate(errors: Magnitudes, allowed: Allowance) -> Gate:
    """Are most elements? Where PyTorch is far off in a few, its rmse and its maximum do not describe the others."""
    return gate_of("bulk", errors.median, allowed.median or 0.0)


def effect_gate(errors: Magnitudes, effect: float) -> Gate:
    """Is the error small relative to the adapter's effect?"""
    return gate_of("effect", errors.rms, LARGEST_ERROR * effect)


def exact_gate(candidate: Array, reference: Array, deployed: Array) -> Gate:
    """Does every integer or boolean equal the reference's? The value is the number of those that do not.

    The deployed model's own value is accepted too: at a near tie, an argmax may be either of two.
    """
    wrong = (candidate != reference) & (candidate != deployed)
    return gate_of("exact", float(np.count_nonzero(wrong)), 0.0)


def tolerance_gate(errors: Magnitudes, reference: Array, tolerance: Tolerance) -> Gate:
    """|O - R| <= atol + rtol · |R| for every element. The value is max(|O - R| - rtol · |R|), the limit is atol."""
    excess = np.abs(errors.values) - tolerance.rtol * np.abs(wide(reference))
    return gate_of("tolerance", float(np.max(excess)), tolerance.atol)


def gate_of(name: str, value: float, allowed: float) -> Gate:
    """A gate and its result. It fails where the limit is not finite, because then everything would pass."""
    return Gate(name, value, allowed, passed=value <= allowed < math.inf)


# --- Controls: error, tail and bulk again, with the same limits, against references that are wrong on purpose ---


class ControlKind(NamedTuple):
    title: str
    model: str  # that the wrong reference is


CONTROL_SCALE = 1.1  # the factor on every scale in the control `scale_1.1`
CONTROLS = {
    "adapter_off": ControlKind("adapter off", "the model without its adapters"),
    "scale_1.1": ControlKind("scale × 1.1", "the model with every adapter scale × 1.1"),
    "values_1.01": ControlKind("values × 1.01", "the model with every value × 1.01"),
    "values_1.1": ControlKind("values × 1.1", "the model with every value × 1.1"),
    "tolerance": ControlKind("tolerance, adapter off", "the model without its adapters"),
}
VALUE_CONTROLS = ("values_1.01", "values_1.1")
DISTANCES = {"adapter_off": 1.0, "scale_1.1": 0.1}  # of the wrong reference from the right one, in effects


def controls_of(
    o: Array,
    r: Array,
    base: Array | None,
    scaled: Array | None,
    *,
    dtype: str,
    allowed: Allowance | None,
    effect: float | None,
    tolerance: Tolerance | None,
) -> Iterator[Control]:
    """Compare the candidate with references that are wrong on purpose. `dtype` is the coarsest of the computation.

    Each must be detected in every float output that the adapter reaches. An integer output is not required: its
    gate has no limit that could be too wide. It counts when the whole set is checked for power.
    """
    factor = CONTROL_VALUE_FACTOR_OF.get(dtype, CONTROL_VALUE_FACTOR)
    of_values = f"values_{factor}"
    if base is None or scaled is None:
        wrong = {of_values: wide(r) * factor if is_float(r) else np.zeros_like(r)}
        required = is_float(o) and bool(np.any(r))
    else:
        wrong = {"adapter_off": base, "scale_1.1": scaled}
        required = is_float(o) and bool(effect)
    for name, truth in wrong.items():
        errors = Magnitudes(difference(o, truth))
        yield Control(name, errors.rms, not _passes(o, truth, errors, allowed), required)
    if base is not None and is_float(o) and not effect and np.any(r):
        # No adapter reaches it. The control is then the one of a model without any adapter.
        truth = wide(r) * factor
        errors = Magnitudes(difference(o, truth))
        yield Control(of_values, errors.rms, not _passes(o, truth, errors, allowed), required=True)
    if tolerance and required and "adapter_off" in wrong:
        errors = Magnitudes(difference(o, wrong["adapter_off"]))
        detected = not tolerance_gate(errors, wrong["adapter_off"], tolerance).passed
        yield Control("tolerance", errors.rms, detected, required)


def _passes(candidate: Array, truth: Array, errors: Magnitudes, allowed: Allowance | None) -> bool:
    if allowed is None:
        return exact_gate(candidate, truth, truth).passed
    gates = [error_gate, tail_gate, *([bulk_gate] if allowed.median is not None else [])]
    return all(gate(errors, allowed).passed for gate in gates)


# --- the features gate: an rmse over the whole output does not show an error in a thousandth of it ---

LEAST_VALUES = 5  # of a feature; with fewer, its size and PyTorch's error in it are a matter of chance


def small_feature_reasons(cases: Sequence[Case], comparisons: Sequence[Comparison], dtype: str) -> Iterator[Reason]:
    """Apply the error gate to small features, all cases together.

    Features are the elements along an axis whose size is the same in every case: classes, a vocabulary, channels.
    Features of similar size (within a factor of ten, over all cases) are judged together, by PyTorch's own error in
    them. Features below eps times the largest are left out: they are the remainder where large numbers cancel.
    """
    for output, measured in _measured_cases(cases, comparisons).items():
        first = measured[0].candidate[output]
        if not is_float(first) or len({case.candidate[output].ndim for case in measured}) > 1:
            continue
        for axis in range(first.ndim):
            sizes = {case.candidate[output].shape[axis] for case in measured}
            if len(sizes) == 1 and sizes.pop() > 1:
                yield from _reasons_along(measured, output, axis, coarser(first, dtype))


def _measured_cases(cases: Sequence[Case], comparisons: Sequence[Comparison]) -> dict[str, list[Case]]:
    by_output: dict[str, list[Case]] = {}
    for comparison in comparisons:
        if comparison.figures is not None:
            by_output.setdefault(comparison.output, []).extend(case for case in cases if case.name == comparison.case)
    return by_output


def _reasons_along(cases: Sequence[Case], output: str, axis: int, dtype: str) -> Iterator[Reason]:
    features = cases[0].candidate[output].shape[axis]
    values = sum(case.candidate[output].size for case in cases) // features  # of each feature
    if values < LEAST_VALUES:
        return
    sizes = _rms_by_feature(cases, axis, lambda case: wide(case.reference[output]))
    errors = _rms_by_feature(cases, axis, lambda case: difference(case.candidate[output], case.reference[output]))
    own = _rms_by_feature(cases, axis, lambda case: difference(case.deployed[output], case.reference[output]))
    for group in _small_groups(sizes, EPS[dtype]):
        limit = ratio_limit(int(group.sum()) * values, dtype)
        allowed = max(limit * rms(own[group]), EPS[dtype] * rms(sizes[group]))
        gate = gate_of("features", rms(errors[group]), allowed)
        if not gate.passed:
            worst = int(np.argmax(np.where(group, errors, 0)))
            text = (
                f"{count(int(group.sum()), 'feature')} of {len(group)} along axis {axis}, small beside the others "
                f"(number {worst} is about {sizes[worst]:.3g}, the largest {sizes.max():.3g}): the error is "
                f"{gate.value:.3g}, allowed is {gate.allowed:.3g}; {cases[0].peer}'s own error is {rms(own[group]):.3g}"
            )
            yield Reason(Outcome.DIFFERENT, "features", text, output=output)


def _rms_by_feature(cases: Sequence[Case], axis: int, values_of: Callable[[Case], Wide]) -> Wide:
    """(features,): the root mean square of each feature over all cases. A peak that has no square is divided out."""
    by_case = [np.moveaxis(values_of(case), axis, -1) for case in cases]
    by_case = [values.reshape(-1, values.shape[-1]) for values in by_case]  # (values, features)
    extremes = [(values.max(0, initial=0.0), -values.min(0, initial=0.0)) for values in by_case]
    peaks = np.max(extremes, axis=(0, 1))
    has_squares = (peaks == 0) | ~np.isfinite(peaks) | ((peaks >= LEAST_SQUARED) & (peaks <= 1 / LEAST_SQUARED))
    divisor = np.where(has_squares, 1.0, peaks)
    scaled = by_case if has_squares.all() else [values / divisor for values in by_case]
    squares = sum(np.einsum("vf,vf->f", values, values) for values in scaled)
    mean = squares / sum(len(values) for values in by_case)
    sizes: Wide = np.where(np.isfinite(peaks), divisor * np.sqrt(mean), peaks)
    return sizes


def _small_groups(sizes: Wide, eps: float) -> Iterator[np.ndarray]:
    """Masks of the features that are a tenth of the largest, a hundredth, and so on down to eps."""
    with np.errstate(divide="ignore"):
        decades = np.floor(np.log10(sizes.max() / sizes)) if sizes.any() else np.zeros_like(sizes)
    for decade in np.unique(decades[(decades > 0) & (sizes >= eps * sizes.max())]):
        yield decades == decade
