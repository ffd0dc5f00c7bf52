"""HRA in PEFT: the inputs are reflected at some planes one after the other, W' = W H₁ ... H_r (Yuan et al. 2024).

With `apply_GS`, the normals of the planes are made orthogonal first, so that the order does not count.
"""

from __future__ import annotations

import numpy as np

from lora_export.errors import InputRefused
from lora_export.formats.peft_kinds.kind import Kind, Stored
from lora_export.pairs.stages import LowRank, Stage
from lora_export.pairs.transforms import WeightTransform

_TITLE = "HRA"


def _change(stored: Stored) -> WeightTransform:
    normals, config = stored.part("hra_u", 2), stored.config
    if normals.shape[1] != config["r"]:
        raise InputRefused(f"hra_u is {normals.shape}, and the config's r is {config['r']}")
    if not normals.any(axis=0).all():
        raise InputRefused("a normal of hra_u is zero: it has no plane")
    settings = {"orthogonal": bool(config.get("apply_GS"))}
    return WeightTransform(
        _TITLE, {"hra_u": normals}, _lower, (0, len(normals)), settings=settings, rank=normals.shape[1]
    )


def _lower(transform: WeightTransform, _shape: tuple[int, int]) -> tuple[Stage, ...]:
    """H₁ ... H_r = I - U T Uᵀ with a triangular T (Schreiber and Van Loan 1989, eq. 8)."""
    if any(size != transform.whole[2] for size in transform.whole[3:]):
        raise InputRefused("PEFT's HRA has reflections for square kernels alone")
    u = transform.stored["hra_u"].astype(np.float64)
    if transform.settings["orthogonal"]:
        u = np.linalg.qr(u).Q
    u = u / np.linalg.norm(u, axis=0)
    t = np.zeros((u.shape[1], u.shape[1]))
    for column in range(u.shape[1]):
        t[:column, column] = -2 * t[:column, :column] @ (u[:, :column].T @ u[:, column])
        t[column, column] = 2
    return (LowRank(turned=True, u=(-u @ t.T).astype(np.float32), v=u.T.astype(np.float32)),)


KIND = Kind(
    peft_type="HRA",
    title=_TITLE,
    change=_change,
    parts=("hra_u",),
    needed=("hra_u",),
    fields=("apply_GS", "init_weights"),
    numbers=("r",),
)
