"""PEFT's kinds that train coefficients of a transform of the weight."""

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
from lora_export.formats.peft_kinds.kind import Stored
from lora_export.formats.peft_kinds.random_matrices import Generator
from lora_export.lora import LoraPair
from lora_export.pairs.computed import CirculantPair, FourierPair, sparse_pair
from lora_export.pairs.open_shape import MatrixShape, OpenPair

PLACES_SEED = "random_loc_seed"


def seeded_places(stored: Stored, values: NDArray[np.float32], shape: MatrixShape) -> NDArray[np.int64]:
    """The places (2, n) that the seed gives these values in a matrix: the start of a permutation of its entries."""
    if values.size > math.prod(shape):
        raise InputRefused(f"the weight is {shape}, the adapter was trained on {values.size} of its entries or more")
    places = Generator(stored.config.get(PLACES_SEED), PLACES_SEED).start_of_permutation(math.prod(shape), values.size)
    return np.stack(np.divmod(places, shape[1]))


def checked_values(stored: Stored, name: str) -> NDArray[np.float32]:
    """The trained values. Raises InputRefused where the config states another number of them.

    With WaveFT's `proportional_parameters` their number follows from the sizes of all layers.
    """
    values, count = stored.part(name, 1), stored.config["n_frequency"]
    if values.size != count and not stored.config.get("proportional_parameters"):
        raise InputRefused(f"{name} has {values.size} values, the config's n_frequency is {count}")
    Generator(stored.config.get(PLACES_SEED), PLACES_SEED)
    return values


def fourierft(stored: Stored) -> OpenPair:
    """FourierFT: trained coefficients of few frequencies, which a seed chooses (Gao et al. 2024)."""
    values = checked_values(stored, "fourierft_spectrum")
    scaling = positive_number("the config", "scaling", stored.config.get("scaling"))

    def pair(shape: MatrixShape, _: Sequence[MatrixShape]) -> LoraPair:
        settings = {"shape": shape, "frequencies": seeded_places(stored, values, shape)}
        return FourierPair({"c": values}, scaling, settings=settings)

    return OpenPair(pair, [values])


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


def waveft(stored: Stored) -> OpenPair:
    """WaveFT: trained wavelet coefficients, or entries, at places that a seed chooses (Bilican et al. 2025).

    `wavelets.json` has the low filter of each wavelet's reconstruction (Daubechies 1992, tables 6.1, 6.3 and 8.1); the
    high one is its mirror image with alternating signs. A filter of length n lets each coefficient change n² entries.
    """
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


def c3a(stored: Stored) -> LoraPair:
    """C3A: blocks of circulant matrices (Chen et al. 2024). PEFT divides the change by the number of inputs."""
    kernels, size = stored.part("c3a_kernel", 3), stored.config["block_size"]
    if kernels.shape[2] != size:
        raise InputRefused(f"c3a_kernel is {kernels.shape}, the config's block_size is {size}")
    return CirculantPair({"w": kernels}, 1 / (kernels.shape[1] * kernels.shape[2]))
