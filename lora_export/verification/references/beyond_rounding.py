"""Where PyTorch's own error is more than rounding can explain, so that it cannot say how large an error is allowed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from lora_export.runtime.runner import Arrays
from lora_export.verification import parity
from lora_export.verification.compare_outputs import error_of

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
    deployed: Mapping[str, Arrays],
    reference: Mapping[str, Arrays],
    unjudged: UnjudgedPositions,
    dtype: str,
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
