"""Figures of arrays: how far apart they lie, and how large they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.verification.parity.verdict import Histogram, WorstElement

Array = NDArray[Any]
Arrays = Mapping[str, Array]  # output -> its values
Wide = NDArray[np.float64]

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}  # from 1 to the next number
FEW_EPS = 4  # what a last rounding and a sum in another order may cost the worst element


def rms(x: Wide) -> float:
    """The root mean square. Divided by the peak first: neither 1e200 nor 1e-200 survives being squared."""
    largest = peak(x)
    return largest * float(np.sqrt(np.mean(np.square(x / largest)))) if 0 < largest < math.inf else largest


def histogram(x: Wide) -> Histogram:
    """How large the numbers are, by powers of two."""
    exponents = np.frexp(x[x != 0])[1] - 1  # 2^e <= |x| < 2^(e+1)
    if not exponents.size:
        return Histogram(0, (), x.size)
    first = int(exponents.min())
    return Histogram(first, tuple(map(int, np.bincount(exponents - first))), x.size - exponents.size)


def peak(x: Wide) -> float:
    return float(np.max(np.abs(x), initial=0.0))


def wide(x: Array) -> Wide:
    return x.astype(np.float64, copy=False)


def is_float(array: Array) -> bool:
    return array.dtype.name in EPS


def coarser(output: Array, dtype: str) -> str:
    """The dtype that limits an output: a bf16 model's logits are not finer for being handed out in fp32."""
    name = output.dtype.name
    return name if EPS.get(name, 0.0) > EPS[dtype] else dtype


def ratio(value: float | None, unit: float | None) -> float | None:
    return value / unit if value is not None and unit else None


def effect_of(reference: Array, base: Array) -> float:
    """What the adapter does to an output; 0 where that is no more than the reference's own rounding."""
    effect = rms(wide(reference) - wide(base))
    noise = FEW_EPS * EPS[reference.dtype.name] * rms(wide(reference)) if is_float(reference) else 0.0
    return effect if effect > noise else 0.0


def worst_element(candidate: Array, reference: Array) -> WorstElement:
    wrong = np.abs(wide(candidate) - wide(reference))
    index = tuple(int(i) for i in np.unravel_index(int(np.argmax(wrong)), wrong.shape))
    return WorstElement(index, float(candidate[index]), float(reference[index]))


def max_relative(candidate: Wide, reference: Wide) -> float | None:
    where = reference != 0
    if not where.any():
        return None
    return float(np.max(np.abs(candidate[where] - reference[where]) / np.abs(reference[where])))


def cosine(candidate: Wide, reference: Wide) -> float | None:
    if not (candidate.any() and reference.any()):
        return None
    return float(np.mean((candidate / rms(candidate)) * (reference / rms(reference))))


def is_logits(output: str, array: Array) -> bool:
    return "logits" in output and is_float(array) and array.ndim > 0 and array.shape[-1] >= 2


def top1(candidate: Array, reference: Array) -> float:
    return float(np.mean(wide(candidate).argmax(-1) == reference.argmax(-1)))


def kl(candidate: Array, reference: Array) -> float:
    """The mean of KL(reference || candidate) over all rows, in nats."""
    of_reference, of_candidate = _log_softmax(wide(reference)), _log_softmax(wide(candidate))
    divergence = np.sum(np.exp(of_reference) * (of_reference - of_candidate), axis=-1)
    return max(0.0, float(np.mean(divergence)))  # it is never negative but by rounding


def _log_softmax(x: Wide) -> Wide:
    shifted = x - x.max(-1, keepdims=True)
    result: Wide = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
