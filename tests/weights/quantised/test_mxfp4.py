"""Experts in mxfp4 as floats: bit for bit what transformers makes of them on a CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lora_export.errors import InputRefused
from lora_export.weights.quantised import mxfp4
from lora_export.weights.quantised.mxfp4 import mxfp4_weights
from support.quantised import Tensors, bits_of, opened

EXPERTS, OUTPUTS, BLOCKS = 3, 10, 4
INPUTS = 32 * BLOCKS


def stored(lowest: int = 100, highest: int = 140) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shape = (EXPERTS, OUTPUTS, BLOCKS)
    return {
        "x.down_proj_blocks": torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8),
        "x.down_proj_scales": torch.randint(lowest, highest, shape, generator=generator, dtype=torch.uint8),
    }


@pytest.mark.parametrize(
    ("dtype", "scales"),
    [
        *((dtype, (115, 135)) for dtype in ("bfloat16", "float16", "float32")),
        *((dtype, (0, 10)) for dtype in ("bfloat16", "float32")),  # to the smallest numbers that bfloat16 has
        ("bfloat16", (245, 252)),
    ],
)
def test_experts_are_the_library_s_bit_for_bit(dtype: str, scales: tuple[int, int], tmp_path: Path) -> None:
    tensors = stored(*scales)
    weight = opened(tmp_path / "m.safetensors", tensors, mxfp4_weights, dtype=dtype)
    expected = convert_moe_packed_tensors(
        tensors["x.down_proj_blocks"], tensors["x.down_proj_scales"], dtype=getattr(torch, dtype)
    )
    assert (weight.tensor.name, weight.tensor.shape) == ("x.down_proj", (EXPERTS, INPUTS, OUTPUTS)) == (
        "x.down_proj", tuple(expected.shape)
    )  # fmt: skip
    assert bits_of(weight.whole) == bits_of(expected)
    assert len(np.unique(weight.whole.astype(np.float32))) > 10


def test_rows_may_begin_and_end_anywhere(tmp_path: Path) -> None:
    tensors = stored()
    weight = opened(tmp_path / "m.safetensors", tensors, mxfp4_weights)
    expected = convert_moe_packed_tensors(tensors["x.down_proj_blocks"], tensors["x.down_proj_scales"])
    rows = expected.reshape(EXPERTS * INPUTS, OUTPUTS)
    for first, last in [(0, 1), (31, 33), (5, INPUTS), (INPUTS - 1, INPUTS + 1), (100, 3 * INPUTS), (200, 264)]:
        assert bits_of(weight.rows(slice(first, last))) == bits_of(rows[first:last]), (first, last)


def test_numbers_are_those_of_the_format(tmp_path: Path) -> None:
    """One expert of one output, by hand: the low half of a byte first; a scale of 128 doubles, one of 126 halves."""
    blocks = torch.zeros(1, 1, 2, 16, dtype=torch.uint8)
    blocks[0, 0, 0, 0], blocks[0, 0, 0, 15], blocks[0, 0, 1, 0] = 0x21, 0xF7, 0xA9
    scales = torch.tensor([[[128, 126]]], dtype=torch.uint8)
    weight = opened(tmp_path / "m.safetensors", {"w_blocks": blocks, "w_scales": scales}, mxfp4_weights)
    column = weight.whole[0, :, 0].astype(np.float32)
    assert column[[0, 1, 30, 31, 32, 33]].tolist() == [1, 2, 12, -12, -0.25, -0.5]
    assert not column[2:30].any() and not column[34:].any()


def test_few_rows_read_few_bytes(tmp_path: Path) -> None:
    weight = opened(tmp_path / "m.safetensors", stored(), mxfp4_weights)
    assert weight.tensor.pieces is not None
    (own,) = weight.tensor.pieces(slice(INPUTS + 33, INPUTS + 60))
    row = 16 * BLOCKS
    assert own == (OUTPUTS * row + 16, 16, OUTPUTS, row)
    assert weight.tensor.rows_at_once == INPUTS < mxfp4.INPUTS_AT_ONCE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x.down_proj_blocks": torch.zeros(3, 10, 64, dtype=torch.uint8)}, r"mxfp4 needs \(experts, outputs, blocks"),
        ({"x.down_proj_blocks": torch.zeros(3, 10, 4, 8, dtype=torch.uint8)}, r"the shape is \[3, 10, 4, 8\]"),
        ({"x.down_proj_blocks": torch.zeros(0, 10, 4, 16, dtype=torch.uint8)}, r"the shape is \[0, 10, 4, 16\]"),
        ({"x.down_proj_blocks": torch.zeros(3, 10, 4, 16)}, "its dtype is float32, and x.down_proj needs uint8"),
        ({"x.down_proj_scales": torch.zeros(3, 10, 3, dtype=torch.uint8)}, "90 elements, and x.down_proj needs 120"),
        ({"x.down_proj_scales": torch.zeros(10, 3, 4, dtype=torch.uint8)}, r"the blocks need \[3, 10, 4\]"),
        ({"y_blocks": torch.zeros(1, 1, 1, 16, dtype=torch.uint8)}, "y_scales, which belongs to it, is missing"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: Tensors, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=message):
        opened(tmp_path / "m.safetensors", stored() | change, mxfp4_weights)


def test_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    tensors = stored()
    tensors["x.down_proj_scales"][1, 2, 3] = 255
    weight = opened(tmp_path / "m.safetensors", tensors, mxfp4_weights)
    weight.rows(slice(0, INPUTS))
    with pytest.raises(InputRefused, match=r"x\.down_proj_scales: a scale of 255 is no number"):
        weight.rows(slice(INPUTS, 2 * INPUTS))
