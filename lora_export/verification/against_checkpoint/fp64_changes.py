"""The change of a pair in fp64, for pairs whose product is no plain B A: by the formula of each kind.

Shares no code with the pairs that it judges.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lora_export.lora import LoraPair
from lora_export.pairs.computed import CirculantPair, FlatKroneckerPair, FourierPair, SparsePair
from lora_export.pairs.structured import KroneckerPair, StructuredPair, WholePair
from lora_export.verification.parity import Wide


class WholeChange(NamedTuple):
    """B A (out, inputs) of a pair, without its scale, and how far an entry in fp32 may be away, in steps of 2⁻²⁴."""

    values: Wide
    steps: Wide  # of the shape of values


def change_in_fp64(pair: LoraPair) -> WholeChange | None:
    """The change of a pair by its own formula; None where B A is its definition."""
    formula = FORMULAS.get(type(pair))
    if formula is None or not isinstance(pair, StructuredPair):
        return None
    values = np.asarray(formula(pair)).reshape(pair.shape_of_whole[0], -1)
    steps = np.broadcast_to(_steps_of_fourier(pair), values.shape) if isinstance(pair, FourierPair) else np.abs(values)
    for axis, chosen in enumerate((pair.rows, pair.columns)):
        if chosen is not None:
            values, steps = np.take(values, chosen, axis), np.take(steps, chosen, axis)
    return WholeChange(values, steps)


def _steps_of_fourier(pair: FourierPair) -> float:
    """No sum of the products of coefficients, cosines and sines is larger than the sum of the coefficients.

    A fast transform takes a few steps for each doubling of its size (Higham 2002, section 24.1).
    """
    out, inputs = pair.shape_of_whole
    operations = 4 * np.log2(out * inputs) + 4
    return float(operations * np.abs(pair.c.astype(np.float64)).sum() / (out * inputs))


def _kronecker(pair: Any) -> Wide:
    return np.kron(pair.w1.astype(np.float64), pair.w2.reshape(len(pair.w2), -1).astype(np.float64))


def _flat_kronecker(pair: Any) -> Wide:
    return np.kron(pair.w1.astype(np.float64)[None], pair.w2.astype(np.float64))


def _whole(pair: Any) -> Wide:
    return np.asarray(pair.change, np.float64)


def _sparse(pair: Any) -> Wide:
    values = np.zeros(pair.shape_of_whole)
    np.add.at(values, tuple(pair.settings["places"]), pair.v.astype(np.float64))
    return values


def _circulant(pair: Any) -> Wide:
    """Line k of a block is its kernel, moved on by k."""
    lines = [np.roll(pair.w.astype(np.float64), line, axis=2) for line in range(pair.w.shape[2])]
    return np.stack(lines, axis=1).reshape(pair.shape_of_whole)


def _fourier(pair: Any) -> Wide:
    spectrum = np.zeros(pair.shape_of_whole)
    spectrum[tuple(pair.settings["frequencies"])] = pair.c
    return np.fft.ifft2(spectrum).real


FORMULAS: dict[type[LoraPair], Callable[[Any], Wide]] = {
    KroneckerPair: _kronecker,
    FlatKroneckerPair: _flat_kronecker,
    WholePair: _whole,
    SparsePair: _sparse,
    CirculantPair: _circulant,
    FourierPair: _fourier,
}
