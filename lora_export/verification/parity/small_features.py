"""The features gate: the error gate for features that are small beside the others.

An rmse over the whole output does not show an error in a feature that is a thousandth of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lora_export.errors import count
from lora_export.verification.parity.case import Case
from lora_export.verification.parity.figures import EPS, Wide, coarser, difference, is_float, rms, wide
from lora_export.verification.parity.gates import gate_of, ratio_limit
from lora_export.verification.parity.verdict import Comparison, Outcome, Reason

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
    """(features,): the root mean square of each feature over all cases. As in `rms`, the peak is divided out first."""
    by_case = [np.abs(np.moveaxis(values_of(case), axis, -1)) for case in cases]
    by_case = [values.reshape(-1, values.shape[-1]) for values in by_case]  # (values, features)
    peaks = np.max([values.max(0, initial=0.0) for values in by_case], axis=0)
    divisor = np.where((peaks > 0) & np.isfinite(peaks), peaks, 1.0)
    squares = sum(np.square(values / divisor).sum(0) for values in by_case)
    mean = squares / sum(len(values) for values in by_case)
    sizes: Wide = np.where(divisor == peaks, peaks * np.sqrt(mean), peaks)
    return sizes


def _small_groups(sizes: Wide, eps: float) -> Iterator[np.ndarray]:
    """Masks of the features that are a tenth of the largest, a hundredth, and so on down to eps."""
    with np.errstate(divide="ignore"):
        decades = np.floor(np.log10(sizes.max() / sizes)) if sizes.any() else np.zeros_like(sizes)
    for decade in np.unique(decades[(decades > 0) & (sizes >= eps * sizes.max())]):
        yield decades == decade
