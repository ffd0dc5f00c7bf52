"""FourierFT: trained coefficients of few frequencies, which a seed chooses (Gao et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats.adapter_files import positive_number
from lora_export.formats.peft_kinds.kind import Kind, Stored
from lora_export.formats.peft_kinds.torch_random import Generator
from lora_export.lora import LoraPair
from lora_export.pairs.computed import FourierPair
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


def _change(stored: Stored) -> OpenPair:
    values = checked_values(stored, "fourierft_spectrum")
    scaling = positive_number("the config", "scaling", stored.config.get("scaling"))

    def pair(shape: MatrixShape, _: Sequence[MatrixShape]) -> LoraPair:
        settings = {"shape": shape, "frequencies": seeded_places(stored, values, shape)}
        return FourierPair({"c": values}, scaling, settings=settings)

    return OpenPair(pair, [values])


KIND = Kind(
    peft_type="FOURIERFT",
    title="FourierFT",
    change=_change,
    parts=("fourierft_spectrum",),
    needed=("fourierft_spectrum",),
    fields=("scaling", PLACES_SEED, "init_weights", "fan_in_fan_out"),
    numbers=("n_frequency",),
    patterns={"n_frequency_pattern": "n_frequency"},
)
