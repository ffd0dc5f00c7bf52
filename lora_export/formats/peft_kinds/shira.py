"""SHiRA: few entries of the weight are trained (Bhardwaj et al. 2024). Their places are in the file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora_export.errors import InputRefused
from lora_export.formats.peft_kinds.kind import Kind, Stored
from lora_export.lora import LoraPair
from lora_export.pairs.computed import SparsePair
from lora_export.pairs.open_shape import MatrixShape, OpenPair


def _change(stored: Stored) -> OpenPair:
    values, indices = stored.part("shira_weight", 1), stored.parts["shira_indices"]  # floats where Windows saved them
    places = indices.astype(np.int64) if np.isfinite(indices.astype(np.float64)).all() else np.full(indices.shape, -1)
    if places.shape != (2, values.size) or (places != indices).any():
        raise InputRefused(f"shira_indices {indices.shape} {indices.dtype} are not the places of {values.size} entries")

    def pair(shape: MatrixShape, _: Sequence[MatrixShape]) -> LoraPair:
        return SparsePair({"v": values}, 1.0, settings={"places": places, "shape": shape})

    return OpenPair(pair, [values])


KIND = Kind(
    peft_type="SHIRA",
    title="SHiRA",
    change=_change,
    parts=("shira_weight", "shira_indices"),
    needed=("shira_weight", "shira_indices"),
    fields=("r", "mask_type", "random_seed", "fan_in_fan_out", "init_weights"),
)
