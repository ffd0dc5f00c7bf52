"""PVeRA: VeRA with a trained distribution. What it computes with its mean is read, as PEFT does without sampling."""

from __future__ import annotations

from collections.abc import Sequence

from lora_export.errors import InputRefused
from lora_export.formats.peft_kinds.kind import Kind, Stored
from lora_export.formats.peft_kinds.torch_random import Generator
from lora_export.formats.peft_kinds.vera import PROJECTION_SEED, projections, scaled_projections
from lora_export.lora import LoraPair
from lora_export.pairs.open_shape import MatrixShape, OpenPair


def _change(stored: Stored) -> OpenPair:
    both, of_outputs = stored.part("pvera_lambda_d", 1), stored.part("pvera_lambda_b", 1)
    rank = stored.config["r"]
    if len(both) != 2 * rank:
        raise InputRefused(
            f"pvera_lambda_d has {len(both)} values, the config's rank is {rank}, and it needs twice that"
        )
    Generator(stored.config.get(PROJECTION_SEED), PROJECTION_SEED)

    def pair(shape: MatrixShape, shapes: Sequence[MatrixShape]) -> LoraPair:
        shared = projections(stored, 2 * rank, rank, shapes, "pvera")
        return scaled_projections(both[:rank], of_outputs, shape, shared)

    return OpenPair(pair, [both[:rank], of_outputs], len(of_outputs))


KIND = Kind(
    peft_type="PVERA",
    title="PVeRA",
    change=_change,
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
