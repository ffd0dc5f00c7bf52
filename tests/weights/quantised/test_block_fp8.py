"""8-bit floats with a scale for each block, as floats: PyTorch's own conversion times the scale, rounded once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from lora_export.errors import InputRefused
from lora_export.weights.quantised.block_fp8 import block_fp8_weights
from support.quantised import OpenedWeight, Tensors, bits_of, opened

BLOCK = (4, 8)
SHAPE = (10, 20)  # the last blocks are smaller, in both directions
GRID = (3, 3)


def stored(scale_dtype: torch.dtype = torch.float32) -> Tensors:
    torch.manual_seed(0)
    return {
        "x.weight": (torch.randn(SHAPE) * 100).to(torch.float8_e4m3fn),
        "x.weight_scale_inv": (torch.rand(GRID) + 0.01).to(scale_dtype),
        "norm.weight": torch.ones(20),
    }


def by_hand(tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
    scales = tensors["x.weight_scale_inv"].float()
    whole = scales.repeat_interleave(BLOCK[0], 0)[: SHAPE[0]].repeat_interleave(BLOCK[1], 1)[:, : SHAPE[1]]
    return (tensors["x.weight"].float() * whole).to(dtype)


def found(tensors: Tensors, path: Path, dtype: str = "bfloat16", **fields: object) -> OpenedWeight:
    return opened(path, tensors, block_fp8_weights, {"weight_block_size": list(BLOCK)} | fields, dtype)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_are_the_product_in_fp32_rounded_once(dtype: str, scale_dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = stored(scale_dtype)
    weight = found(tensors, tmp_path / "m.safetensors", dtype)
    tensor = weight.tensor
    assert (tensor.name, tensor.shape, tensor.parts) == ("x.weight", SHAPE, ("x.weight_scale_inv",))
    expected = by_hand(tensors, getattr(torch, dtype))
    for rows in (slice(0, 10), slice(3, 5), slice(9, 10)):
        assert bits_of(weight.rows(rows)) == bits_of(expected[rows])


@pytest.mark.parametrize(
    "scales",
    [
        torch.tensor(0.3),
        torch.tensor([0.3]),
        torch.rand(2, 4) + 0.1,
        (torch.rand(10, 1) + 0.1).bfloat16(),
        torch.arange(100, 140, dtype=torch.uint8).reshape(10, 4),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_other_blocks_are_read_as_transformers_reads_them(scales: torch.Tensor, dtype: str, tmp_path: Path) -> None:
    tensors = stored() | {"x.weight_scale_inv": scales}
    expected = Fp8Dequantize(None)._dequantize_one(tensors["x.weight"], scales, getattr(torch, dtype))
    weight = found(tensors, tmp_path / "m.safetensors", dtype, weight_block_size=None)
    for rows in (slice(0, 10), slice(3, 5)):
        assert bits_of(weight.rows(rows)) == bits_of(expected[rows])


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        ({"x.weight_scale_inv": torch.ones(2, 3)}, {}, r"\[2, 3\], which divides \[10, 20\] neither evenly nor into"),
        ({"x.weight_scale_inv": torch.ones(4, 3)}, {}, r"neither evenly nor into blocks of \[4, 8\]"),
        ({"x.weight_scale_inv": torch.ones(5)}, {}, "neither evenly"),
        ({"x.weight_scale_inv": torch.ones(0, 20)}, {}, "neither evenly"),
        ({"x.weight_scale_inv": torch.ones(20, 20)}, {}, "400 elements, and x.weight needs 200"),
        ({"x.weight_scale_inv": torch.ones(3, 3, dtype=torch.int32)}, {}, "its dtype is int32"),
        ({}, {"weight_block_size": [4]}, "not two positive numbers"),
        ({}, {"weight_block_size": [0, 8]}, "not two positive numbers"),
        ({"y.bias": torch.ones(4).to(torch.float8_e4m3fn)}, {}, "no weight of a linear layer"),
    ],
)
def test_scales_that_do_not_fit_are_refused(
    change: Tensors, fields: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputRefused, match=message):
        found(stored() | change, tmp_path / "m.safetensors", **fields)


def test_scales_of_activations_belong_to_the_weight(tmp_path: Path) -> None:
    weight = found(stored() | {"x.activation_scale": torch.ones(1)}, tmp_path / "m.safetensors")
    assert weight.tensor.parts == ("x.weight_scale_inv", "x.activation_scale")


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (torch.full(GRID, torch.nan), "9 scales are not finite numbers"),
        (torch.full((10, 4), 255, dtype=torch.uint8), "a scale of 255 is no number"),
    ],
)
def test_scales_that_are_no_numbers_are_refused(scales: torch.Tensor, message: str, tmp_path: Path) -> None:
    weight = found(stored() | {"x.weight_scale_inv": scales}, tmp_path / "m.safetensors")
    with pytest.raises(InputRefused, match=message):
        weight.rows(slice(0, 1))
