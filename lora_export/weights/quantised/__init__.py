"""The weights of a quantised checkpoint, read as the floats that its own library makes of them.

    stored_parts.py        the tensors that a quantised weight is stored in
    bitsandbytes.py        nf4, fp4 (double quantisation too) and int8
    block_fp8.py           8-bit floats with a scale for each block (DeepSeek)
    compressed_tensors.py  integers of 4 and 8 bits, 8-bit floats

A scheme is added as one file, and one line in `SCHEMES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lora_export.errors import InputRefused
from lora_export.storage.safetensors_file import TensorFile
from lora_export.weights.quantised.bitsandbytes import bitsandbytes_weights
from lora_export.weights.quantised.block_fp8 import block_fp8_weights
from lora_export.weights.quantised.compressed_tensors import compressed_weights
from lora_export.weights.quantised.stored_parts import QuantisedTensor, StoredParts

__all__ = ["QUANTIZATION", "QuantisedTensor", "find_quantised", "method_of", "remedy_for", "without_quantisation"]

QUANTIZATION = "quantization_config"  # of a config

ReadWeights = Callable[[StoredParts, Mapping[str, Any], str], dict[str, QuantisedTensor]]

# `quant_method` of a config -> the reader of its weights
SCHEMES: dict[str, ReadWeights] = {
    "bitsandbytes": bitsandbytes_weights,
    "fp8": block_fp8_weights,
    "compressed-tensors": compressed_weights,
}
KNOWN = "bitsandbytes (nf4, fp4, int8), fp8 in blocks and compressed-tensors"


def method_of(quantization: Any) -> str:
    """The `quant_method` of a config's `quantization_config`."""
    return str(quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization)


def remedy_for(quantization: Any) -> str:
    """How a quantised base becomes a float model, as the end of a message."""
    if method_of(quantization) in SCHEMES:
        return "make this one a float model: merge --dequantize"
    return "dequantise this one first, with its own library"


def find_quantised(
    shards: Mapping[str, TensorFile], quantization: Mapping[str, Any], dtype: str
) -> dict[str, QuantisedTensor]:
    """The quantised weights of a checkpoint, by name. `quantization` is the config's `quantization_config`.

    `dtype` is the float dtype of the model, for schemes that do not store it with each weight. Reads the small tensors
    that describe a weight, and no weight. Raises InputRefused for a scheme that is not known, and for a weight whose
    parts are missing or do not fit.
    """
    method = method_of(quantization)
    if method not in SCHEMES:
        raise InputRefused(
            f"--dequantize knows {KNOWN}, and this base is quantised by {method}. Merge into the original float model, "
            "or dequantise this one with its own library"
        )
    found = SCHEMES[method](StoredParts(shards), quantization, dtype)
    if not found:
        raise InputRefused(f"the config names {method}, and no weight is stored so: remove its quantization_config")
    return found


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a dequantised model: no part of it has a `quantization_config`."""
    return {
        key: without_quantisation(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != QUANTIZATION
    }
