"""Values as a format stores them, without rounding; and what a format cannot hold, by name."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused, listed
from lora_export.lora import Adapter, LoraPair
from lora_export.options.spelling import named

_HALVES = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))
BESIDES = {  # what an adapter may have besides pairs: its field -> what it is
    "magnitude": "DoRA's magnitude",
    "replaced": "a whole tensor",
    "biases": "a change of a bias",
    "added": "a change of a vector",
    "token_rows": "rows of tokens",
    "tied": "the repetition of the pair of another module",
}
NEIGHBOURS = 3  # floats beside the nearest alpha that are tried


def smallest_dtype(arrays: Iterable[NDArray[np.float32]]) -> np.dtype[np.generic]:
    """The smallest type that holds every value of all arrays exactly: bfloat16, float16 or float32."""
    arrays = list(arrays)
    for dtype in _HALVES:
        with np.errstate(over="ignore"):  # an infinity is no equal value
            if all(np.array_equal(array.astype(dtype).astype(np.float32), array) for array in arrays):
                return dtype
    return np.dtype(np.float32)


def alpha_of(scale: float, divisor: float) -> float:
    """The alpha for which alpha / divisor is the scale, to the last bit where a float has it, else the nearest.

    The divisor is the rank, or its root. An alpha that is a whole number is preferred.
    """
    nearest = scale * divisor
    candidates = [float(round(nearest)), nearest]
    for direction in (-math.inf, math.inf):
        value = nearest
        for _ in range(NEIGHBOURS):
            value = math.nextafter(value, direction)
            candidates.append(value)
    return min(candidates, key=lambda alpha: abs(alpha / divisor - scale))


def pair_factors(pairs: Iterable[LoraPair]) -> Iterator[NDArray[np.float32]]:
    """A, B and the magnitude of each pair."""
    for pair in pairs:
        yield pair.a
        yield pair.b
        if pair.magnitude is not None:
            yield pair.magnitude


def beyond_pairs(adapter: Adapter, allowed: Collection[str] = ()) -> list[str]:
    """What an adapter has besides pairs, one line each. `allowed` names the fields that the format can hold."""
    problems = [
        f"{name}: {type(pair).__name__} is no low-rank pair"
        for name, pair in adapter.pairs.items()
        if type(pair) is not LoraPair
    ]
    if adapter.flattened:
        problems.append(
            f"the names of its modules, in which `_` stands for the dots: state their model by {named('base')}"
        )
    for field, names in adapter.beyond_pairs.items():
        if field in BESIDES and field not in allowed:
            problems += [f"{name}: {BESIDES[field]}" for name in names]
    return problems


def refuse_inexpressible(adapter: Adapter, target: str, problems: Sequence[str]) -> None:
    """Raise InputRefused with all that a format cannot express."""
    if problems:
        raise InputRefused(
            f"the format {target} cannot express everything in {adapter.name}:",
            listed(sorted(problems), len(problems)),
            "Nothing was written.",
        )
