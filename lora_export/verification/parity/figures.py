"""Figures of arrays: errors, magnitudes, agreement of class scores; and the gates and controls that they are put to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

PYTORCH = "PyTorch"


@dataclass(frozen=True)
class Gate:
    """One check of one output. It passes where `value` is at most `allowed`."""

    name: str
    value: float
    allowed: float
    passed: bool

    @property
    def limit_used(self) -> float:
        """value / allowed: over 1 is a failure."""
        if self.allowed:
            return self.value / self.allowed
        return 0.0 if self.passed else math.inf


@dataclass(frozen=True)
class Control:
    """The gates applied with a reference that is wrong on purpose. They must fail, or they could not have failed."""

    name: str
    error: float  # rmse of the candidate against the wrong reference
    detected: bool
    required: bool  # False for an output that the mistake cannot change, as where no adapter reaches it

    @property
    def is_missed(self) -> bool:
        """Whether the check failed to detect a mistake that it had to detect."""
        return self.required and not self.detected


@dataclass(frozen=True)
class WorstElement:
    """The element of the candidate that is farthest from the reference."""

    index: tuple[int, ...]
    candidate: float
    reference: float


@dataclass(frozen=True)
class Histogram:
    """Magnitudes by powers of two: counts[i] elements are in [2^(first+i), 2^(first+i+1)), `zeros` elements are 0."""

    first: int
    counts: tuple[int, ...]
    zeros: int


@dataclass(frozen=True)
class Figures:
    """The measurements of one output in one case, in the units of the output unless stated otherwise.

    O is the candidate, R the reference, P the peer (PyTorch as deployed), B the reference without adapters.
    """

    dtype: str
    shape: tuple[int, ...]
    ratio_limit: float  # allowed multiple of the peer's own error; 0 for integers and booleans
    error: float  # rmse(O, R)
    deployed_error: float  # rmse(P, R)
    ratio: float | None  # error / deployed_error; None where the peer is exact
    max_error: float  # max |O - R|
    deployed_max_error: float  # max |P - R|
    max_relative_error: float | None  # max |O - R| / |R| where R is not 0
    worst: WorstElement
    effect: float | None  # rmse(R, B), the adapter's effect; None without an adapter
    relative_to_effect: float | None  # error / effect; None where there is no effect
    cosine: float | None  # of O and R; None where one of them is all zero
    top1: float | None  # fraction of rows with the same largest class; class scores only
    kl: float | None  # mean KL(R || O) in nats; class scores only
    merge_loss: float | None  # rmse(R with rounded weights, R) / effect, where weights were rounded
    errors: Histogram  # |O - R|, element by element
    deployed_errors: Histogram  # |P - R|
    effects: Histogram | None  # |R - B|; None without an adapter
    gates: tuple[Gate, ...]
    controls: tuple[Control, ...]
    peer: str = field(default=PYTORCH, repr=False)  # the implementation whose own error sets the limits

    @property
    def limit_used(self) -> float:
        """value / allowed of the gate that is closest to its limit: over 1 is a failure."""
        return max(gate.limit_used for gate in self.gates)

    def gate(self, name: str) -> Gate | None:
        """The gate of this name; None where it was not applied."""
        return next((gate for gate in self.gates if gate.name == name), None)


Array = NDArray[Any]
Outputs = Mapping[str, Array]  # output -> its values
Wide = NDArray[np.float64]

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}  # from 1 to the next number
FEW_EPS = 4  # eps that a last rounding and another order of summation may cost the worst element
LEAST_SQUARED = 1e-100  # an array whose peak is between this and its inverse has squares: 1e200 and 1e-200 have none


@dataclass(eq=False)
class Magnitudes:
    """An array in fp64, such as the errors of an output. What is measured of its magnitudes is computed once."""

    values: Wide

    @cached_property
    def peak(self) -> float:
        """The largest magnitude; 0 for an empty array."""
        return peak(self.values)

    @cached_property
    def rms(self) -> float:
        """The root mean square."""
        if not 0 < self.peak < math.inf:
            return self.peak
        is_squared = LEAST_SQUARED <= self.peak <= 1 / LEAST_SQUARED
        flat = (self.values if is_squared else self.values / self.peak).reshape(-1)
        root = math.sqrt(np.einsum("i,i", flat, flat) / flat.size)
        return root if is_squared else self.peak * root

    @cached_property
    def median(self) -> float:
        """The median of the magnitudes."""
        return float(np.median(np.abs(self.values)))

    def are_spiked(self, times: float) -> bool:
        """Whether the rms is more than so many times the median. That is computed where most elements are as small."""
        are_small = np.abs(self.values) * times < self.rms
        return bool(2 * np.count_nonzero(are_small) >= are_small.size) and self.rms > times * self.median


def rms(x: Wide) -> float:
    """The root mean square."""
    return Magnitudes(x).rms


def histogram(x: Wide) -> Histogram:
    """The magnitudes of the elements, counted by powers of two."""
    exponents = np.frexp(x.ravel() if x.all() else x[x != 0])[1] - 1  # 2^e <= |x| < 2^(e+1)
    if not exponents.size:
        return Histogram(0, (), x.size)
    first = int(exponents.min())
    return Histogram(first, tuple(map(int, np.bincount(exponents - first))), x.size - exponents.size)


def peak(x: Wide) -> float:
    """The largest magnitude; 0 for an empty array."""
    return float(np.abs(np.maximum(x.max(initial=0.0), -x.min(initial=0.0))))


def wide(x: Array) -> Wide:
    return x.astype(np.float64, copy=False)


def difference(one: Array, other: Array) -> Wide:
    return wide(one) - wide(other)


def is_float(array: Array) -> bool:
    return array.dtype.name in EPS


def coarser(output: Array, dtype: str) -> str:
    """The coarser of the output's dtype and `dtype`: logits of a bf16 model are no more precise in fp32."""
    name = output.dtype.name
    return name if EPS.get(name, 0.0) > EPS[dtype] else dtype


def ratio(value: float | None, unit: float | None) -> float | None:
    """value / unit; None where either is None, or the unit is 0."""
    return value / unit if value is not None and unit else None


def effect_of(change: Magnitudes, truth: Magnitudes, dtype: str) -> float:
    """rmse(R, B), the adapter's effect on an output; 0 where it is no more than the reference's own rounding.

    `change` is R - B, `truth` is R, and `dtype` that of R.
    """
    noise = FEW_EPS * EPS.get(dtype, 0.0) * truth.rms
    return change.rms if change.rms > noise else 0.0


def worst_element(candidate: Array, reference: Array, errors: Wide) -> WorstElement:
    index = tuple(int(i) for i in np.unravel_index(int(np.argmax(np.abs(errors))), errors.shape))
    return WorstElement(index, float(candidate[index]), float(reference[index]))


def max_relative(errors: Wide, reference: Wide) -> float | None:
    """max |O - R| / |R| over the elements where R is not 0; None where there is none."""
    where = reference != 0
    if not where.any():
        return None
    return peak(errors / reference if where.all() else errors[where] / reference[where])


def cosine(candidate: Magnitudes, reference: Magnitudes) -> float | None:
    """The cosine similarity; None where one of the arrays is all zero."""
    if not (candidate.peak and reference.peak):
        return None
    return float(np.mean((candidate.values / candidate.rms) * (reference.values / reference.rms)))


def is_class_scores(output: str, array: Array) -> bool:
    """Whether the last axis holds the scores of classes.

    A contrastive model's `logits_per_image` holds similarities to the other inputs of its batch, not classes.
    """
    named_so = "logits" in output and "logits_per_" not in output
    return named_so and is_float(array) and array.ndim > 0 and array.shape[-1] >= 2


def top1_agreement(candidate: Array, reference: Array, deployed: Array) -> float | None:
    """The fraction of rows with the same largest class, among the rows where PyTorch's rounding cannot change it.

    None where there is no such row: which of two equal classes comes first means nothing.
    """
    truth = wide(reference)
    second, first = np.moveaxis(np.partition(truth, -2, axis=-1)[..., -2:], -1, 0)
    decided = first - second > 2 * peak(wide(deployed) - truth)
    if not decided.any():
        return None
    return float(np.mean((wide(candidate).argmax(-1) == truth.argmax(-1))[decided]))


def kl_divergence(candidate: Array, reference: Array) -> float:
    """The mean of KL(reference || candidate) over all rows, in nats."""
    of_reference, of_candidate = _log_softmax(wide(reference)), _log_softmax(wide(candidate))
    divergence = np.sum(np.exp(of_reference) * (of_reference - of_candidate), axis=-1)
    return max(0.0, float(np.mean(divergence)))  # negative by rounding alone


def _log_softmax(x: Wide) -> Wide:
    shifted = x - x.max(-1, keepdims=True)
    result: Wide = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
