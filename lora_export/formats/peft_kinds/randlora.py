"""RandLoRA: a sum of scaled random matrices that all layers share, of full rank together (Albert et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora_export.errors import InputRefused
from lora_export.formats.adapter_files import Tensors
from lora_export.formats.peft_config import adapter_scale
from lora_export.formats.peft_kinds.kind import Kind, Stored
from lora_export.lora import LoraPair
from lora_export.pairs.computed import FactoredPair, PairFactors, RowChoice
from lora_export.pairs.open_shape import MatrixShape, OpenPair


def _change(stored: Stored) -> OpenPair:
    weights, gamma = stored.part("randlora_lambda", 2), stored.part("randlora_gamma", 2)
    tensors = {**stored.shared, **stored.parts}  # PEFT saves them once, and again for each layer
    if not {"randlora_A", "randlora_B"} <= tensors.keys():
        raise InputRefused(
            "its random matrices are not saved, and PEFT draws them in a type that depends on the device. Save the "
            "adapter with save_projection=True"
        )
    a, b = (np.asarray(tensors[name], np.float32) for name in ("randlora_A", "randlora_B"))
    rank, (bases, least) = stored.config["r"], gamma.shape
    if weights.shape != (rank, bases) or a.ndim != 3 or a.shape[:2] != (rank, 1) or b.ndim != 3 or b.shape[2] != rank:
        raise InputRefused(
            f"randlora_lambda {weights.shape}, randlora_gamma {gamma.shape}, randlora_A {a.shape} and randlora_B "
            f"{b.shape} disagree with each other, or with the rank {rank}"
        )
    scale = adapter_scale(rank, stored.config["randlora_alpha"], {})

    def pair(shape: MatrixShape, _: Sequence[MatrixShape]) -> LoraPair:
        most = max(shape)
        if min(shape) != least or a.shape[2] < least or len(b) < most or b.shape[1] < bases:
            raise InputRefused(f"the weight is {shape}, the adapter was trained on one with {least} inputs or outputs")
        # PEFT flattens the two axes of both in different orders.
        wide = b[:most, :bases].reshape(most, rank * bases)

        def factors(own: Tensors, rows: RowChoice) -> PairFactors:
            narrow = (own["weights"][:, :, None] * a[:, :, :least] * own["gamma"]).reshape(rank * bases, least)
            return (narrow, wide[rows]) if shape[1] == least else (wide.T, narrow.T[rows])

        settings = {"shape": (rank * bases, *shape), "factors": factors}
        return FactoredPair({"weights": weights, "gamma": gamma}, scale, settings=settings)

    return OpenPair(pair, [weights, gamma])


KIND = Kind(
    peft_type="RANDLORA",
    title="RandLoRA",
    change=_change,
    parts=("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"),
    needed=("randlora_lambda", "randlora_gamma"),
    shared=("randlora_A", "randlora_B"),
    fields=(
        *("projection_prng_key", "save_projection", "sparse", "very_sparse", "randlora_dropout", "fan_in_fan_out"),
        "init_weights",
    ),
    numbers=("r", "randlora_alpha"),
)
