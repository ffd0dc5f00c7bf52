"""PEFT's kinds that train few entries of a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lora_export.errors import InputRefused
from lora_export.formats.peft_kinds.kind import Stored
from lora_export.lora import LoraPair
from lora_export.pairs.computed import SparsePair
from lora_export.pairs.open_shape import MatrixShape, OpenPair
from lora_export.pairs.stages import EntryWise, Stage
from lora_export.pairs.transforms import WeightTransform


def shira(stored: Stored) -> OpenPair:
    """SHiRA: few entries of the weight are trained (Bhardwaj et al. 2024). Their places are in the file."""
    values, indices = stored.part("shira_weight", 1), stored.parts["shira_indices"]  # floats where Windows saved them
    places = indices.astype(np.int64) if np.isfinite(indices.astype(np.float64)).all() else np.full(indices.shape, -1)
    if places.shape != (2, values.size) or (places != indices).any():
        raise InputRefused(f"shira_indices {indices.shape} {indices.dtype} are not the places of {values.size} entries")

    def pair(shape: MatrixShape, _: Sequence[MatrixShape]) -> LoraPair:
        return SparsePair({"v": values}, 1.0, settings={"places": places, "shape": shape})

    return OpenPair(pair, [values])


_FACTORS = ("supertuning_lora_A.weight", "supertuning_lora_B.weight")


def supertuning(stored: Stored) -> OpenPair:
    """SuperTuning: few entries of the weight are trained, those of the largest values, perhaps beside a LoRA (Supra).

    Their places are in the file unless `save_precomputed_indices` is false: which of equal values were taken is then
    known to PyTorch alone.
    """
    values = stored.part("supertuning_values", 1)
    if "supertuning_indices" not in stored.parts:
        raise InputRefused(
            "it has no supertuning_indices: PEFT chooses the entries by the base's values, and which of equal ones it "
            "takes is not known. Save the adapter with save_precomputed_indices=True"
        )
    indices = stored.parts["supertuning_indices"]
    if not np.issubdtype(indices.dtype, np.integer):
        raise InputRefused(f"supertuning_indices are {indices.dtype}; integers are needed")
    indices = indices.astype(np.int64)
    if indices.shape != values.shape or (indices < 0).any() or len(np.unique(indices)) < len(indices):
        raise InputRefused(f"supertuning_indices {indices.shape} are not the places of {values.size} entries")
    rank, alpha = stored.config.get("r"), stored.config.get("lora_alpha")
    if rank and not (type(rank) is int and isinstance(alpha, int | float) and math.isfinite(alpha)):
        raise InputRefused(f"r is {rank!r}, and lora_alpha {alpha!r}")
    if bool(rank) is not all(name in stored.parts for name in _FACTORS):
        raise InputRefused(f"the config's r is {rank}, and it has {', '.join(stored.parts)}")

    def pair(shape: MatrixShape, _: Sequence[MatrixShape]) -> LoraPair:
        places = np.stack(np.divmod(indices, shape[1]))
        sparse = SparsePair({"v": values}, 1.0, settings={"places": places, "shape": shape})
        if not rank:
            return sparse
        a, b = (stored.part(name, 2) for name in _FACTORS)
        if (len(a), b.shape[1:]) != (rank, (rank,)):
            raise InputRefused(f"A {a.shape} and B {b.shape} disagree with the config's rank {rank}")
        low_rank = LoraPair(a=a, b=b, scale=float(alpha or 0) / rank)

        def lower(transform: WeightTransform, shape: tuple[int, int]) -> tuple[Stage, ...]:
            del transform, shape
            return EntryWise(addend=sparse), EntryWise(addend=low_rank)

        tensors = {"values": values, "a": a, "b": b}
        settings = {"indices": indices, "scale": low_rank.scale}
        return WeightTransform(stored.title, tensors, lower, shape, settings=settings, rank=rank)

    return OpenPair(pair, [values])
