"""Weights of NVIDIA's modelopt in nvfp4: 4-bit floats, with scales of groups and one of the whole weight.

    weight          u8, two numbers in a byte
    weight_scale    e4m3, one for each group of 16 columns
    weight_scale_2  fp32, one number, by which the scales are multiplied (compressed-tensors divides by its own)

The product is made in fp32, and rounded once to the dtype of the model.

Source: nvidia-modelopt 0.47, whose results are in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_export.errors import InputRefused
from lora_export.options.spelling import named
from lora_export.weights.quantised.new_grid import to_floats8
from lora_export.weights.quantised.packed_numbers import FLOAT4_VALUES
from lora_export.weights.quantised.stored_parts import DecodeScales, QuantisedTensor, StoredParts, in_groups

MODELOPT_ALGORITHMS = ("NVFP4", "W4A16_NVFP4")
SECOND_SCALE = "weight_scale_2"
NVFP4_COLUMNS, NVFP4_BYTES = 16, 8  # columns that share a scale, and their bytes
INPUT_SCALES = ("input_scale", "input_scale_2")  # a float model has no use for them
CHANGED_INPUTS = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")


def modelopt_weights(parts: StoredParts, quantization: Mapping[str, Any], dtype: str) -> dict[str, QuantisedTensor]:
    """The weights in nvfp4, by name. Raises InputRefused for another algorithm, and where inputs are scaled too."""
    algorithm = str(quantization.get("quant_algo", "unknown")).upper()
    if algorithm not in MODELOPT_ALGORITHMS:
        raise InputRefused(
            f"{named('dequantize', True)} reads {' and '.join(MODELOPT_ALGORITHMS)} of modelopt, and this base has "
            f"{algorithm}. Merge into the original float model, or dequantise this one with its own library"
        )
    for kind in CHANGED_INPUTS:
        for module in parts.modules_with(kind):
            raise InputRefused(f"{module}.{kind} changes the inputs of the layer: its weight alone is not its function")
    return {f"{module}.weight": _tensor(parts, module, np.dtype(dtype)) for module in parts.modules_with(SECOND_SCALE)}


def _tensor(parts: StoredParts, module: str, dtype: np.dtype[Any]) -> QuantisedTensor:
    name = f"{module}.weight"
    first, second = f"{module}.weight_scale", f"{module}.{SECOND_SCALE}"
    numbers, scales = parts.expect(name, name, "uint8"), parts.expect(first, name, "float8_e4m3fn")
    parts.expect(second, name, "float32", count=1)
    groups = scales.shape[-1] if scales.shape else 0
    is_matrix = len(scales.shape) == 2 and math.prod(scales.shape) > 0
    if not is_matrix or numbers.shape != (scales.shape[0], NVFP4_BYTES * groups):
        raise InputRefused(
            f"{name}: the shape {list(numbers.shape)} does not fit scales of {list(scales.shape)} for "
            f"{NVFP4_COLUMNS} columns"
        )

    def load_scales() -> DecodeScales:
        whole = parts.read_scales(second).reshape(-1)
        return lambda stored: stored.astype(np.float32) * whole

    every = (first, second, *parts.present(*(f"{module}.{what}" for what in INPUT_SCALES)))
    return in_groups(
        *(parts, name, numbers, scales, NVFP4_COLUMNS * groups, dtype, every, "modelopt nvfp4"),
        values=FLOAT4_VALUES + np.float32(0),  # the library's table has no -0
        reach=float(FLOAT4_VALUES.max()),
        load_scales=load_scales,
        encode=lambda factors: to_floats8(factors / parts.read_scales(second).reshape(-1)),
    )
