"""The gates that an output has to pass, and the controls that must not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lora_export.errors import InputRefused
from lora_export.verification.parity.figures import EPS, FEW_EPS, Array, Wide, is_float, peak, rms, wide
from lora_export.verification.parity.verdict import Control, Gate

FEW_ELEMENTS = 10
LARGEST_SHARE = 0.1  # of the adapter's effect that the error may be
LARGEST_LOSS = 1.0  # of the adapter's effect that rounding the weights may cost
SPIKED = 10  # times its median that the rmse of PyTorch's error is where a few elements hold most of it
CONTROL_VALUE_FACTOR = 1.01


@dataclass(frozen=True)
class Tolerance:
    """The classical |O-R| <= atol + rtol * |R|, on top of the gates where the user asks for it."""

    atol: float
    rtol: float

    def __post_init__(self) -> None:
        for name, value in (("atol", self.atol), ("rtol", self.rtol)):
            if not 0 <= value < math.inf:
                raise InputRefused(f"{name} is {value}; a tolerance is a finite number and not negative")


@dataclass(frozen=True)
class Allowance:
    """How far from the truth an output may lie: k times as far as PyTorch itself."""

    k: float
    rmse: float
    peak: float
    median: float | None = None  # of |O - R|; None where PyTorch's rmse speaks for most of its elements


def slack(elements: int, dtype: str) -> float:
    """k: two, or three in half precision; more for a few elements, whose rmse is itself a matter of chance."""
    if elements <= FEW_ELEMENTS:
        return 10.0
    if elements <= 500:
        return 8.0
    return 2.0 if EPS[dtype] <= EPS["float32"] else 3.0


def allow(reference: Array, own: Wide, *, k: float, eps: float) -> Allowance:
    """What R and PyTorch's `own` errors, P - R, alone determine.

    With ten elements or less, `own` holds the same output's errors in all cases: from one element
    alone, PyTorch would now and then be exact by luck (in 7 % of all right candidates, measured on
    normal errors with k = 10), and the candidate be blamed for it.
    """
    truth = wide(reference)
    floor = eps * rms(truth)  # for a P that happens to be exact
    median = float(np.median(np.abs(own)))
    return Allowance(
        k,
        rmse=max(k * rms(own), floor),
        peak=k * peak(own) + FEW_EPS * eps * peak(truth),
        median=max(k * median, floor) if own.size > FEW_ELEMENTS and rms(own) > SPIKED * median else None,
    )


def gates_of(
    o: Array,
    r: Array,
    p: Array,
    *,
    allowed: Allowance | None,
    effect: float | None,
    loss: float | None,
    tolerance: Tolerance | None,
) -> Iterator[Gate]:
    if allowed is None:
        yield exact_gate(o, r, p)
        return
    yield error_gate(o, r, allowed)
    yield tail_gate(o, r, allowed)
    if allowed.median is not None:
        yield bulk_gate(o, r, allowed)
    if effect:
        yield effect_gate(o, r, effect)
    if loss is not None:
        yield gate_of("loss", loss, LARGEST_LOSS * (effect or 0.0))
    if tolerance:
        yield tolerance_gate(o, r, tolerance)


def error_gate(candidate: Array, truth: Array, allowed: Allowance) -> Gate:
    """Is it as close to the truth as PyTorch itself is?"""
    return gate_of("error", rms(wide(candidate) - wide(truth)), allowed.rmse)


def tail_gate(candidate: Array, truth: Array, allowed: Allowance) -> Gate:
    """Is every single element? One bad element in a million hides from an rmse."""
    return gate_of("tail", peak(wide(candidate) - wide(truth)), allowed.peak)


def bulk_gate(candidate: Array, truth: Array, allowed: Allowance) -> Gate:
    """Are most elements? Where PyTorch itself loses a few, its rmse and its worst say nothing of the others."""
    return gate_of("bulk", float(np.median(np.abs(wide(candidate) - wide(truth)))), allowed.median or 0.0)


def effect_gate(candidate: Array, reference: Array, effect: float) -> Gate:
    """Is the error small beside what the adapter does?"""
    return gate_of("effect", rms(wide(candidate) - wide(reference)), LARGEST_SHARE * effect)


def exact_gate(candidate: Array, reference: Array, deployed: Array) -> Gate:
    """Is every integer or boolean the reference's? Counts those that are not.

    The deployed model's own value will do: an argmax over a near tie may fall either way.
    """
    wrong = (candidate != reference) & (candidate != deployed)
    return gate_of("exact", float(np.count_nonzero(wrong)), 0.0)


def tolerance_gate(candidate: Array, reference: Array, tolerance: Tolerance) -> Gate:
    """|O-R| <= atol + rtol * |R| for every element. The value is max(|O-R| - rtol * |R|), which atol allows."""
    excess = np.abs(wide(candidate) - wide(reference)) - tolerance.rtol * np.abs(wide(reference))
    return gate_of("tolerance", float(np.max(excess)), tolerance.atol)


def gate_of(name: str, value: float, allowed: float) -> Gate:
    # An allowance that is not finite would let everything pass.
    return Gate(name, value, allowed, passed=value <= allowed < math.inf)


# The controls. Each puts error, tail and bulk again, with the same allowance, to a wrong reference.

CONTROL_SCALE = 1.1  # the factor on every scale in the control `scale_1.1`
CONTROLS = {
    "adapter_off": "the model without its adapters",
    "scale_1.1": "the model with every scale x 1.1",
    "values_1.01": "the model with every value x 1.01",
    "tolerance": "the model without its adapters",
}
WRONG_BY = {"adapter_off": 1.0, "scale_1.1": 0.1}  # how far such a reference lies from the right one, in effects


def controls_of(
    o: Array,
    r: Array,
    base: Array | None,
    scaled: Array | None,
    *,
    allowed: Allowance | None,
    effect: float | None,
    tolerance: Tolerance | None,
) -> Iterator[Control]:
    """Referees that are wrong on purpose. Each float that the adapter reaches is required to tell them apart.

    An integer's gate allows nothing, so it cannot be too wide: it counts only when the whole set is
    asked whether it could tell.
    """
    if base is None or scaled is None:
        wrong = {"values_1.01": wide(r) * CONTROL_VALUE_FACTOR if is_float(r) else np.zeros_like(r)}
        required = is_float(o) and bool(np.any(r))
    else:
        wrong = {"adapter_off": base, "scale_1.1": scaled}
        required = is_float(o) and bool(effect)
    for name, truth in wrong.items():
        yield Control(name, rms(wide(o) - wide(truth)), not _passes(o, truth, allowed), required)
    if base is not None and is_float(o) and not effect and np.any(r):
        # No adapter reaches it: that its gates are not too wide is shown as it is without any adapter.
        truth = wide(r) * CONTROL_VALUE_FACTOR
        yield Control("values_1.01", rms(wide(o) - truth), not _passes(o, truth, allowed), required=True)
    if tolerance and required and "adapter_off" in wrong:
        told = not tolerance_gate(o, wrong["adapter_off"], tolerance).passed
        yield Control("tolerance", rms(wide(o) - wide(wrong["adapter_off"])), told, required)


def _passes(candidate: Array, truth: Array, allowed: Allowance | None) -> bool:
    if allowed is None:
        return exact_gate(candidate, truth, truth).passed
    gates = [error_gate, tail_gate, *([bulk_gate] if allowed.median is not None else [])]
    return all(gate(candidate, truth, allowed).passed for gate in gates)
