"""WaveFT: trained wavelet coefficients at places that a seed chooses, or entries at these places (Bilican et al. 2025).

`wavelets.json` has the low filter of each wavelet's reconstruction (Daubechies 1992, tables 6.1, 6.3 and 8.1); the high
one is its mirror image with alternating signs. A filter of length n lets each coefficient change n² entries.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats.adapter_files import positive_number
from lora_export.formats.peft_kinds.fourierft import PLACES_SEED, checked_values, seeded_places
from lora_export.formats.peft_kinds.kind import Kind, Stored
from lora_export.lora import LoraPair
from lora_export.pairs.computed import sparse_pair
from lora_export.pairs.open_shape import MatrixShape, OpenPair

_WAVELETS = Path(__file__).with_name("wavelets.json")


@functools.cache
def filters(wavelet: str) -> NDArray[np.float64]:
    """The low and the high filter of the reconstruction (2, length). Raises InputRefused for an unknown wavelet.

    PEFT's own filters of `coif4` and `coif5` are none of a wavelet: their squares do not add up to 1.
    """
    known = json.loads(_WAVELETS.read_text(encoding="utf-8"))
    if wavelet not in known:
        raise InputRefused(f"wavelet_family is {wavelet!r}; supported are {', '.join(known)}")
    low = np.array(known[wavelet])
    return np.stack([low, low[::-1] * (-1.0) ** np.arange(len(low))])


def _change(stored: Stored) -> OpenPair:
    values = checked_values(stored, "waveft_spectrum")
    scaling = positive_number("the config", "scaling", stored.config.get("scaling"))
    is_transformed = stored.config.get("use_idwt", True)
    both = filters(str(stored.config.get("wavelet_family", "db1")))

    def pair(shape: MatrixShape, shapes: Sequence[MatrixShape]) -> LoraPair:
        if stored.config.get("proportional_parameters") and values.size != _share(stored, shape, shapes):
            raise InputRefused(
                f"the weight is {shape}, whose share of n_frequency is not the {values.size} in the file"
            )
        places = seeded_places(stored, values, shape)
        entries: NDArray[np.floating[Any]] = values
        if is_transformed:
            entries, places = _reconstructed(values, places, shape, both)
        return sparse_pair(entries, places, shape, scaling)

    return OpenPair(pair, [values])


def _share(stored: Stored, shape: MatrixShape, shapes: Sequence[MatrixShape]) -> int:
    """How many frequencies of those of all layers a layer has by its size."""
    part = math.prod(shape) / sum(map(math.prod, shapes))
    count: int = stored.config["n_frequency"] * len(shapes)
    return max(1, round(part * count))


def _reconstructed(
    values: NDArray[np.float32], places: NDArray[np.int64], shape: MatrixShape, filters: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The entries of the inverse transform of one level.

    The left half of the coefficients has low frequencies along the rows, the upper half along the columns. PEFT puts
    them in the middle of a matrix that is larger by the filter's length less 2, and even, and cuts both ends off again.
    """
    length = filters.shape[1]
    sizes = np.array(shape)[:, None]
    padded = (sizes + length - 1) // 2 * 2
    places, halves = places + (padded - sizes) // 2, padded // 2
    is_high = places >= halves
    first = 2 * (places - halves * is_high) - (length - 2)
    along_rows, along_columns = (filters[high.astype(int)] for high in (is_high[1], is_high[0]))
    entries = values[:, None, None] * along_rows[:, :, None] * along_columns[:, None, :]
    rows, columns = (first[axis][:, None] + np.arange(length) for axis in (0, 1))
    spread = np.broadcast_arrays(rows[:, :, None], columns[:, None, :])
    targets = np.stack([each.reshape(-1) for each in spread])
    inside = ((targets >= 0) & (targets < sizes)).all(axis=0)
    return entries.reshape(-1)[inside], targets[:, inside]


KIND = Kind(
    peft_type="WAVEFT",
    title="WaveFT",
    change=_change,
    parts=("waveft_spectrum",),
    needed=("waveft_spectrum",),
    fields=(
        "scaling",
        PLACES_SEED,
        "init_weights",
        "fan_in_fan_out",
        "wavelet_family",
        "use_idwt",
        "proportional_parameters",
    ),
    numbers=("n_frequency",),
    patterns={"n_frequency_pattern": "n_frequency"},
)
