"""PVeRA: VeRA with a trained distribution. What it computes with its mean is read, as PEFT does without sampling."""

from __future__ import annotations

import functools

from lora_export.formats.peft_kinds.kind import Kind
from lora_export.formats.peft_kinds.vera import PROJECTION_SEED, change

KIND = Kind(
    peft_type="PVERA",
    title="PVeRA",
    change=functools.partial(change, name="pvera", times=2),
    parts=("pvera_lambda_b", "pvera_lambda_d"),
    needed=("pvera_lambda_b", "pvera_lambda_d"),
    shared=("pvera_A", "pvera_B"),
    fields=(
        PROJECTION_SEED,
        "save_projection",
        "pvera_dropout",
        "d_initial",
        "init_weights",
        "fan_in_fan_out",
        "generator_seed",
    ),
    numbers=("r",),
    refused={"sample_at_inference": "it draws a change anew for each input, which no weight can do"},
)
