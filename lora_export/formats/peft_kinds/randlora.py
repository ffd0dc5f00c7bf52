"""RandLoRA: a sum of scaled random matrices that all layers share, of full rank together (Albert et al. 2025).

Sparse ones have -1, 0 and 1, divided by their deviation. They are drawn from the seed where the file lacks them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats.adapter_files import Tensors
from lora_export.formats.peft_config import adapter_scale
from lora_export.formats.peft_kinds.kind import Kind, Stored
from lora_export.formats.peft_kinds.torch_random import Generator
from lora_export.formats.peft_kinds.vera import PROJECTION_SEED
from lora_export.lora import LoraPair
from lora_export.pairs.computed import FactoredPair, PairFactors, RowChoice
from lora_export.pairs.open_shape import MatrixShape, OpenPair


def _change(stored: Stored) -> OpenPair:
    weights, gamma = stored.part("randlora_lambda", 2), stored.part("randlora_gamma", 2)
    tensors = {**stored.shared, **stored.parts}  # PEFT saves them once, and again for each layer
    rank, (bases, least) = stored.config["r"], gamma.shape
    saved = [np.asarray(tensors[name], np.float32) for name in ("randlora_A", "randlora_B") if name in tensors]
    if len(saved) < 2 and not (stored.config.get("sparse") or stored.config.get("very_sparse")):
        raise InputRefused(
            "its random matrices are not saved, and PEFT draws them in a type that depends on the device. Save the "
            "adapter with save_projection=True"
        )
    if weights.shape != (rank, bases):
        raise InputRefused(f"randlora_lambda {weights.shape} and randlora_gamma {gamma.shape} disagree")
    scale = adapter_scale(rank, stored.config["randlora_alpha"], {})
    Generator(stored.config.get(PROJECTION_SEED), PROJECTION_SEED)

    def pair(shape: MatrixShape, shapes: Sequence[MatrixShape]) -> LoraPair:
        most = max(shape)
        a, b = saved if len(saved) == 2 else _drawn(stored, rank, shapes)
        if a.ndim != 3 or a.shape[:2] != (rank, 1) or b.ndim != 3 or b.shape[2] != rank:
            raise InputRefused(f"randlora_A {a.shape} and randlora_B {b.shape} disagree with the rank {rank}")
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


def _drawn(stored: Stored, rank: int, shapes: Sequence[MatrixShape]) -> Sequence[NDArray[np.float32]]:
    """A (rank, 1, inputs) and B (outputs, bases, rank) that PEFT draws for a seed, A first."""
    least, most = sorted(max(shape[axis] for shape in shapes) for axis in (0, 1))
    sparsity = math.sqrt(least) if stored.config.get("very_sparse") else 3
    generator = Generator(stored.config.get(PROJECTION_SEED), PROJECTION_SEED)
    found, part = [], 1 / (2 * sparsity)
    for size in ((rank, 1, least), (most, -(-least // rank), rank)):
        uniform = generator.uniform(size, 0, 1)
        signs = (uniform > np.float32(1 - part)).astype(np.float32) - (uniform < np.float32(part))
        found.append((signs / np.std(signs, dtype=np.float64, ddof=1)).astype(np.float32))
    return found


KIND = Kind(
    peft_type="RANDLORA",
    title="RandLoRA",
    change=_change,
    parts=("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"),
    needed=("randlora_lambda", "randlora_gamma"),
    shared=("randlora_A", "randlora_B"),
    fields=(
        *(PROJECTION_SEED, "save_projection", "sparse", "very_sparse", "randlora_dropout", "fan_in_fan_out"),
        "init_weights",
    ),
    numbers=("r", "randlora_alpha"),
)
