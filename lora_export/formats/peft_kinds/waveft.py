"""WaveFT: trained wavelet coefficients at places that a seed chooses, or entries at these places (Bilican et al. 2025).

Of the families of wavelets, Haar's (`db1`, the default) is read: each coefficient changes four entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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

_LOW, _HIGH = (np.array(taps) / np.sqrt(2) for taps in ([1, 1], [1, -1]))  # Haar's filters of the reconstruction


def _change(stored: Stored) -> OpenPair:
    values = checked_values(stored, "waveft_spectrum")
    scaling = positive_number("the config", "scaling", stored.config.get("scaling"))
    is_transformed = stored.config.get("use_idwt", True)
    if is_transformed and stored.config.get("wavelet_family", "db1") != "db1":
        raise InputRefused(f"wavelet_family is {stored.config['wavelet_family']!r}; only db1 is supported")

    def pair(shape: MatrixShape, shapes: Sequence[MatrixShape]) -> LoraPair:
        if stored.config.get("proportional_parameters") and values.size != _share(stored, shape, shapes):
            raise InputRefused(
                f"the weight is {shape}, whose share of n_frequency is not the {values.size} in the file"
            )
        places = seeded_places(stored, values, shape)
        entries: NDArray[np.floating[Any]] = values
        if is_transformed:
            entries, places = _reconstructed(values, places, shape)
        return sparse_pair(entries, places, shape, scaling)

    return OpenPair(pair, [values])


def _share(stored: Stored, shape: MatrixShape, shapes: Sequence[MatrixShape]) -> int:
    """How many frequencies of those of all layers a layer has by its size."""
    part = math.prod(shape) / sum(map(math.prod, shapes))
    count: int = stored.config["n_frequency"] * len(shapes)
    return max(1, round(part * count))


def _reconstructed(
    values: NDArray[np.float32], places: NDArray[np.int64], shape: MatrixShape
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The entries of the inverse transform of one level.

    The left half of the coefficients has low frequencies along the rows, the upper half along the columns. Odd sizes
    are padded by one; PEFT puts the added line last, and cuts it off again.
    """
    halves = np.array([-(-size // 2) for size in shape])[:, None]
    is_high = places >= halves
    first = 2 * (places - halves * is_high)
    along_rows, along_columns = (np.where(high[:, None], _HIGH, _LOW) for high in (is_high[1], is_high[0]))
    entries = values[:, None, None] * along_rows[:, :, None] * along_columns[:, None, :]
    rows, columns = (first[axis][:, None] + np.arange(2) for axis in (0, 1))
    spread = np.broadcast_arrays(rows[:, :, None], columns[:, None, :])
    targets = np.stack([each.reshape(-1) for each in spread])
    inside = (targets < np.array(shape)[:, None]).all(axis=0)
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
