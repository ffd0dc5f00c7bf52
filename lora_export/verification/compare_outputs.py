"""Compare the outputs of two runs by name, by error and bit for bit; and PyTorch's with what rounding can explain."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.runtime.runner import Arrays
from lora_export.verification import parity

PRECISION_GATES = {"error", "tail", "bulk", "features"}  # these compare a candidate's error with its peer's


def named_as(reference: parity.Outputs, outputs: Arrays) -> Arrays:
    """The outputs that the reference has, by its names: by order where the graph has as many of other names."""
    if len(outputs) == len(reference) and reference.keys() != outputs.keys():
        return dict(zip(reference, outputs.values(), strict=True))
    return {name: outputs[name] for name in reference if name in outputs}


def aligned(outputs: Arrays, reference: parity.Outputs, *, names_known: bool) -> Arrays:
    """All outputs of a candidate, by the reference's names: by order where names do not identify them."""
    if names_known or len(outputs) != len(reference):
        return outputs
    return dict(zip(reference, outputs.values(), strict=True))


def differs_in_precision_alone(verdict: parity.Verdict) -> bool:
    """Whether a verdict is `different` only because the candidate's error is larger than its peer's."""
    failed = {reason.gate for reason in verdict.reasons if reason.outcome is parity.Outcome.DIFFERENT}
    return bool(failed) and failed <= PRECISION_GATES


def different_by_themselves(verdict: parity.Verdict) -> set[str]:
    """The cases in which an output is different whatever the peer's error in other cases is."""
    return {
        comparison.case
        for comparison, figures in verdict.measured
        for reason in comparison.reasons
        if reason.outcome is parity.Outcome.DIFFERENT
        and reason.gate in PRECISION_GATES
        and math.prod(figures.shape) > parity.FEW_ELEMENTS
    }


def with_larger_peer_error(
    cases: Sequence[parity.Case], others: Sequence[parity.Case], *, farthest: float = math.inf
) -> list[parity.Case]:
    """The cases; each output of the peer is that of the two peers with the larger error.

    An output of the others whose error is more than `farthest` times that of the cases does not count.

    Every merge of an adapter that is large beside its weight costs digits: (W + ΔW)x is a sum of large numbers that
    nearly cancel, and ΔW x alone is not. A right merge must not be judged by a peer that does not merge.
    """
    return [_with_larger_peer_error(case, other, farthest) for case, other in zip(cases, others, strict=True)]


def _with_larger_peer_error(case: parity.Case, other: parity.Case, farthest: float) -> parity.Case:
    judged, other_judged = case.judged(), other.judged()
    deployed = {}
    for name, own in case.deployed.items():
        error, others = (error_of(each.reference[name], each.deployed[name]) for each in (judged, other_judged))
        is_counted = math.isinf(farthest) or others <= farthest * error  # inf * 0 is no number
        deployed[name] = other.deployed[name] if error < others and is_counted else own
    return replace(case, deployed=deployed)


def error_of(reference: NDArray[Any], output: NDArray[Any]) -> float:
    """The root mean square of the difference."""
    return parity.rms(output.astype(np.float64) - reference)


def candidate_errors(cases: Sequence[parity.Case]) -> dict[str, tuple[float, float | None]]:
    """Output -> rmse(O, R) over all cases, and the same relative to rmse(R, B); None without an adapter."""
    cases = [case.judged() for case in cases]
    errors: dict[str, tuple[float, float | None]] = {}
    for output in cases[0].reference:
        error = _rmse(cases, output, [case.candidate for case in cases])
        effect = None if cases[0].base is None else _rmse(cases, output, [case.base or {} for case in cases])
        errors[output] = error, error / effect if effect else None
    return errors


def _rmse(cases: Sequence[parity.Case], output: str, runs: Sequence[parity.Outputs]) -> float:
    differences = [
        run[output].astype(np.float64) - case.reference[output] for case, run in zip(cases, runs, strict=True)
    ]
    return parity.rms(np.concatenate([difference.ravel() for difference in differences]))


def before_first_token(arrays: Arrays) -> NDArray[np.bool_] | None:
    """Bool [batch, sequence]: the padding before each row's first token; None where there is none.

    The mask is that of Hugging Face models: 1 (or True) for tokens. Other models may mean the opposite by it.
    """
    mask = arrays.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return None
    before: NDArray[np.bool_] = np.cumsum(mask, axis=1) == 0
    return before if before.any() else None


def bits_that_differ(outputs: Mapping[str, Arrays], others: Mapping[str, Arrays]) -> list[str]:
    """Where outputs, by case, are not the same bit for bit: `case, output: largest difference`."""
    return [
        f"{case}, {name}: {_largest_difference(value, others[case][name])}"
        for case, arrays in outputs.items()
        for name, value in arrays.items()
        if bits(value) != bits(others[case][name])
    ]


def bits(array: NDArray[Any]) -> tuple[Any, ...]:
    """A value that is equal for two arrays only if they are the same bit for bit."""
    return array.dtype, array.shape, array.tobytes()


def _largest_difference(one: NDArray[Any], other: NDArray[Any]) -> str:
    if one.shape != other.shape:
        return f"{one.shape} and {other.shape}"
    return f"{np.abs(one.astype(np.float64) - other.astype(np.float64)).max(initial=0):.3g}"


def same_bits(one: Arrays, other: Arrays) -> bool:
    """Whether two runs return the same outputs, bit for bit."""
    return one.keys() == other.keys() and all(bits(value) == bits(other[name]) for name, value in one.items())


LARGEST_DEVIATION = 1e-10  # relative to an output: how far runs that are computed together may be from single ones


def distance(one: parity.Outputs, other: parity.Outputs) -> float:
    """The largest difference, relative to the largest value of its output; NaN where a value is not finite."""
    found = [0.0]
    for name, values in other.items():
        with np.errstate(invalid="ignore"):  # inf - inf
            difference = np.abs(one[name].astype(np.float64) - values)
        difference = np.max(np.where(one[name] == values, 0, difference), initial=0)  # a mask may have an infinity
        size = np.max(np.abs(values), where=np.isfinite(values), initial=0)
        found.append(float(difference / size if size else difference))
    return float(np.max(found))


def differ(one: Arrays, other: Arrays) -> bool:
    return any(not np.array_equal(value, other[name]) for name, value in one.items())


# --- PyTorch's own error beyond rounding: it cannot say how large an error is allowed ---

UnjudgedPositions = Mapping[str, Mapping[str, NDArray[np.bool_]]]  # case -> output -> bool [batch, sequence]

# PyTorch's own error, relative to the output, that rounding can explain: so many eps, and never more than half. Deep
# models have 10 to 100 eps; chains of adapters that outweigh their weights have some thousands.
EPS_OF_ROUNDING, LARGEST_ROUNDING = 2**14, 0.5


def padding_beyond_rounding(
    deployed: Mapping[str, Arrays], reference: Mapping[str, Arrays], inputs: Mapping[str, Arrays], dtype: str
) -> UnjudgedPositions:
    """The positions of padding at which rounding is not PyTorch's only error.

    LongT5 masks with -1e10 all that a position of padding attends to. In fp32 its scores are lost in this number, and
    it attends to everything equally; in fp64 they are not. Nothing reads what comes out of it.
    """
    limit = _largest_rounding(dtype)
    found: dict[str, dict[str, NDArray[np.bool_]]] = {}
    for case, truths in reference.items():
        mask = inputs[case].get("attention_mask")
        for name, truth in truths.items():
            own = deployed[case].get(name)
            if mask is None or mask.ndim != 2 or truth.ndim != 3 or truth.shape[:2] != mask.shape:
                continue
            if own is None or own.shape != truth.shape or not parity.is_float(own) or not mask.any():
                continue
            errors = np.sqrt(np.square(own.astype(np.float64) - truth).mean(axis=-1))  # (batch, sequence)
            beyond = (mask == 0) & (errors > limit * parity.rms(truth[mask != 0]))
            if beyond.any():
                found.setdefault(case, {})[name] = beyond
    return found


def notes_on_padding(unjudged: UnjudgedPositions) -> list[str]:
    """What a verdict notes about such positions."""
    names = sorted({name for by_output in unjudged.values() for name in by_output})
    return [
        f"{name} was not judged at positions of padding where PyTorch's own error is more than rounding can explain: "
        "all that they attend to is masked, by a number in which their scores are lost"
        for name in names
    ]


def _largest_rounding(dtype: str) -> float:
    """PyTorch's own error, relative to the output, that rounding in a dtype explains at most."""
    return min(EPS_OF_ROUNDING * parity.EPS[dtype], LARGEST_ROUNDING)


def outputs_beyond_rounding(
    deployed: Mapping[str, Arrays], reference: Mapping[str, Arrays], unjudged: UnjudgedPositions, dtype: str
) -> Iterator[str]:
    """The outputs in which PyTorch's own error is more than rounding can explain: such an error allows any other."""
    limit = _largest_rounding(dtype)
    for case, truths in reference.items():
        for name, truth in truths.items():
            own = deployed[case].get(name)
            if own is None or own.shape != truth.shape or not parity.is_float(own):
                continue
            is_value = ~parity.fill_mask(truth, own)  # the least float of fp64 is not that of fp32
            if (positions := unjudged.get(case, {}).get(name)) is not None:
                is_value &= ~positions[..., None]
            error, size = error_of(truth[is_value], own[is_value]), parity.rms(truth[is_value])
            if error > limit * size:
                yield (
                    f"{name} in case {case}: PyTorch's own error is {error:.3g}, and rounding in {dtype} explains at "
                    f"most {limit * size:.3g}. It does not compute what the reference computes, so it cannot say how "
                    "large an error is allowed"
                )
