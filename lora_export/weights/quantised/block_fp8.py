"""Weights in 8-bit floats with a scale for each block, as DeepSeek publishes them.

A weight is float8_e4m3fn, and `weight_scale_inv` has a factor for each block of the config's `weight_block_size`; the
last blocks may be smaller. Their product is made in fp32, and rounded once to the dtype of the model.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.storage.block_copy import Bytes
from lora_export.weights.quantised.stored_parts import Decode, QuantisedTensor, StoredParts, refuse_damaged_scales

FP8 = "float8_e4m3fn"
SCALES = "weight_scale_inv"
ACTIVATION_SCALES = ("activation_scale", "input_scale")  # of the layer's inputs: a float model has no use for them
DEFAULT_BLOCK = [128, 128]


def block_fp8_weights(parts: StoredParts, quantization: Mapping[str, Any], dtype: str) -> dict[str, QuantisedTensor]:
    """The weights in 8-bit floats, by name. Raises InputRefused for such a weight without scales."""
    block = quantization.get("weight_block_size") or DEFAULT_BLOCK
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        raise InputRefused(f"the weight_block_size of the config is {block!r}, and not two positive numbers")
    found = {}
    for shard in parts.shards.values():
        for name, entry in shard.entries.items():
            if str(entry.dtype) == FP8:
                found[name] = _quantised(parts, name, entry.shape, (block[0], block[1]), dtype)
    return found


def _quantised(
    parts: StoredParts, name: str, shape: tuple[int, ...], block: tuple[int, int], dtype: str
) -> QuantisedTensor:
    scales_name = f"{name.removesuffix('weight')}{SCALES}"
    if not name.endswith("weight") or len(shape) != 2:
        raise InputRefused(f"{name}: an 8-bit float of the shape {list(shape)} is no weight of a linear layer")
    grid = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    scales = parts.expect(scales_name, name, "float32", "bfloat16", most=grid[0] * grid[1])
    if scales.shape != grid:
        raise InputRefused(
            f"{scales_name}: the shape is {list(scales.shape)}, and {list(shape)} in blocks of {list(block)} needs "
            f"{list(grid)}"
        )

    def load() -> Decode:
        stored = parts.read(scales_name).astype(np.float32)
        refuse_damaged_scales(scales_name, stored)
        return functools.partial(_decode, scales=stored, block=block, columns=shape[1], dtype=np.dtype(dtype))

    module = name.removesuffix("weight")
    every = (scales_name, *parts.present(*(f"{module}{what}" for what in ACTIVATION_SCALES)))
    return QuantisedTensor(name, shape, np.dtype(dtype), name, every, "fp8", load)


def _decode(
    rows: slice,
    packed: Bytes,
    *,
    scales: NDArray[np.float32],
    block: tuple[int, int],
    columns: int,
    dtype: np.dtype[Any],
) -> NDArray[Any]:
    values = packed.view(np.dtype(FP8)).reshape(-1, columns).astype(np.float32)
    of_rows = scales[np.arange(rows.start, rows.stop) // block[0]]
    values *= np.repeat(of_rows, block[1], axis=1)[:, :columns]
    return values.astype(dtype)
