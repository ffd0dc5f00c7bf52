"""Weights in 8-bit floats with a scale for each block, as DeepSeek publishes them.

A weight is float8_e4m3fn, and `weight_scale_inv` has a factor for each block of the config's `weight_block_size`; the
last blocks may be smaller. Other blocks divide the weight evenly: one for all, or 32 columns with powers of two, which
are stored as exponents. The product is made in fp32, and rounded once to the dtype of the model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.weights.quantised.codes import FLOAT8_VALUES, PackedRows, StoredCodes
from lora_export.weights.quantised.new_grid import ScaleRule, to_larger_exponents
from lora_export.weights.quantised.stored_parts import (
    QuantisedTensor,
    StoredParts,
    powers_of_two,
    refuse_damaged_scales,
)

FP8 = "float8_e4m3fn"
SCALES = "weight_scale_inv"
ACTIVATION_SCALES = ("activation_scale", "input_scale")  # of the layer's inputs: a float model has no use for them
DEFAULT_BLOCK = [128, 128]


def block_fp8_weights(parts: StoredParts, quantization: Mapping[str, Any], dtype: str) -> dict[str, QuantisedTensor]:
    """The weights in 8-bit floats, by name. Raises InputRefused for such a weight without scales."""
    block = quantization.get("weight_block_size") or DEFAULT_BLOCK
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        raise InputRefused(f"the weight_block_size of the config is {block!r}, and not two positive numbers")
    entries = {name: entry for shard in parts.shards.values() for name, entry in shard.entries.items()}
    return {
        name: _quantised(parts, name, entry.shape, (block[0], block[1]), np.dtype(dtype))
        for name, entry in entries.items()
        if str(entry.dtype) == FP8
    }


def _quantised(
    parts: StoredParts, name: str, shape: tuple[int, ...], block: tuple[int, int], dtype: np.dtype[Any]
) -> QuantisedTensor:
    scales_name = f"{name.removesuffix('weight')}{SCALES}"
    if not name.endswith("weight") or len(shape) != 2:
        raise InputRefused(f"{name}: an 8-bit float of the shape {list(shape)} is no weight of a linear layer")
    scales = parts.expect(scales_name, name, "float32", "bfloat16", "uint8", most=math.prod(shape))
    own = _block_of(scales.shape, (shape[0], shape[1]), block)
    if own is None:
        raise InputRefused(
            f"{scales_name}: the shape is {list(scales.shape)}, which divides {list(shape)} neither evenly nor into "
            f"blocks of {list(block)}"
        )

    def spread(values: NDArray[np.float32]) -> Callable[[slice], NDArray[np.float32]]:
        of_scales = values.reshape(-(-shape[0] // own[0]), -1)

        def of_rows(rows: slice) -> NDArray[np.float32]:
            each = of_scales[np.arange(rows.start, rows.stop) // own[0]]
            return np.repeat(each, own[1], axis=1)[:, : shape[1]]

        return of_rows

    def decode_scales(stored: NDArray[Any]) -> NDArray[np.float32]:
        factors = powers_of_two(scales_name, stored) if stored.dtype == np.uint8 else stored
        refuse_damaged_scales(scales_name, factors)
        return factors.astype(np.float32)

    module = name.removesuffix("weight")
    every = (scales_name, *parts.present(*(f"{module}{what}" for what in ACTIVATION_SCALES)))
    encode = to_larger_exponents if str(scales.dtype) == "uint8" else None
    largest = float(np.nanmax(FLOAT8_VALUES))
    scaling = ScaleRule(scales_name, lambda: parts.read(scales_name), spread, largest, decode_scales, encode)
    codes = StoredCodes((shape[0], shape[1]), False, FLOAT8_VALUES, PackedRows(8, shape[1], shape[1]), scaling.grid)
    load = functools.partial(codes.decoder, dtype)
    return QuantisedTensor(name, shape, dtype, name, every, "fp8", load, codes=codes, scaling=scaling)


def _block_of(grid: tuple[int, ...], shape: tuple[int, int], stated: tuple[int, int]) -> tuple[int, int] | None:
    """The rows and columns that share a scale; None where such a grid of scales does not fit the shape.

    The stated block may leave smaller blocks at the end. Another one divides the weight evenly, as transformers reads
    it: one scale for all, or groups of columns. A weight may differ from what the config states of most.
    """
    if math.prod(grid) == 1:
        return shape
    if grid == (-(-shape[0] // stated[0]), -(-shape[1] // stated[1])):
        return stated
    if len(grid) != 2 or not math.prod(grid) or shape[0] % grid[0] or shape[1] % grid[1]:
        return None
    return shape[0] // grid[0], shape[1] // grid[1]
