"""compressed-tensors' floats in groups: bit for bit what the library makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from lora_export.errors import InputRefused
from lora_export.weights.quantised.compressed_tensors import compressed_weights
from support.quantised import Tensors, bits_of, opened

ROWS, COLUMNS = 12, 96
FORMATS = {
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp6": "mxfp6-pack-quantized",
    "mxfp8": "mxfp8-quantized",
}


def compressed(kind: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensors, torch.Tensor]:
    """The stored tensors of a weight, and what the library makes of them."""
    torch.manual_seed(0)
    bits, group = int(kind[-1]), 16 if kind == "nvfp4" else 32
    args = QuantizationArgs(
        num_bits=bits,
        type="float",
        strategy="tensor_group" if kind == "nvfp4" else "group",
        symmetric=True,
        group_size=group,
        scale_dtype=torch.float8_e4m3fn if kind == "nvfp4" else torch.uint8,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    weight = torch.randn(ROWS, COLUMNS).to(dtype)
    largest = weight.float().reshape(ROWS, -1, group).abs().amax(-1)
    state = {"weight": weight}
    if kind == "nvfp4":
        state["weight_global_scale"] = torch.tensor([448 * 6 / float(largest.max())])
        state["weight_scale"] = (largest / 6 * state["weight_global_scale"]).to(torch.float8_e4m3fn).to(dtype)
    else:
        state["weight_scale"] = torch.exp2(torch.floor(torch.log2(largest)) - (2 if bits < 8 else 8)).to(dtype)
    compressor = BaseCompressor.get_value_from_registry(FORMATS[kind])
    stored = compressor.compress(state, scheme)
    floats = compressor.decompress(stored, scheme)["weight"]
    assert 0 < float((floats.float() - weight.float()).norm() / weight.float().norm()) < 0.2
    return {f"x.{key}": value.contiguous() for key, value in stored.items()}, floats


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_floats_are_the_library_s_bit_for_bit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    stored, expected = compressed(kind, dtype)
    weight = opened(tmp_path / "m.safetensors", stored, compressed_weights, {"format": FORMATS[kind]})
    tensor = weight.tensor
    assert (tensor.name, tensor.shape, tensor.scheme, str(tensor.dtype)) == ("x.weight", (12, 96), kind, "bfloat16")
    assert {*tensor.parts, tensor.packed} == stored.keys()
    for rows in (slice(0, ROWS), slice(3, 5), slice(ROWS - 1, ROWS)):
        assert bits_of(weight.rows(rows)) == bits_of(expected[rows])


@pytest.mark.parametrize("kind", ["mxfp4", "mxfp6", "mxfp8"])
def test_smallest_and_largest_powers_are_the_library_s(kind: str, tmp_path: Path) -> None:
    stored, _ = compressed(kind)
    scales = torch.tensor([0, 1, 3, 7, 120, 245], dtype=torch.uint8).repeat(6, 1)
    stored["x.weight_scale"] = scales.reshape(ROWS, 3)
    args = QuantizationArgs(num_bits=int(kind[-1]), type="float", strategy="group", symmetric=True, group_size=32)
    own = {name.removeprefix("x."): value for name, value in stored.items()}
    compressor = BaseCompressor.get_value_from_registry(FORMATS[kind])
    expected = compressor.decompress(own, QuantizationScheme(targets=["Linear"], weights=args))["weight"]
    weight = opened(tmp_path / "m.safetensors", stored, compressed_weights)
    assert torch.isfinite(expected).all() and bits_of(weight.whole) == bits_of(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x.weight_scale": torch.ones(ROWS, 3).to(torch.float8_e4m3fn)}, "are none of nvfp4, mxfp4, mxfp6, mxfp8"),
        ({"x.weight_scale": torch.ones(ROWS - 1, 6).to(torch.float8_e4m3fn)}, "are none of nvfp4"),
        ({"x.weight_scale": torch.ones(ROWS, 0).to(torch.float8_e4m3fn)}, "are none of nvfp4"),
        ({"x.weight_scale": torch.ones(ROWS, 6)}, "its dtype is float32, and x.weight needs uint8 or float8_e4m3fn"),
        ({"x.weight_global_scale": torch.ones(2)}, "2 elements, and x.weight needs 1"),
        ({"x.weight_zero_point": torch.ones(ROWS, 6)}, "nvfp4 has no zero points"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: Tensors, message: str, tmp_path: Path) -> None:
    stored, _ = compressed("nvfp4")
    with pytest.raises(InputRefused, match=message):
        opened(tmp_path / "m.safetensors", stored | change, compressed_weights)


@pytest.mark.parametrize("name", ["x.weight_scale", "x.weight_global_scale"])
def test_missing_part_is_refused_by_name(name: str, tmp_path: Path) -> None:
    stored, _ = compressed("nvfp4")
    del stored[name]
    with pytest.raises(InputRefused, match=f"{name}, which belongs to it, is missing"):
        opened(tmp_path / "m.safetensors", stored, compressed_weights)


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        ("nvfp4", "x.weight_global_scale", 0.0, "0.0 is no divisor"),
        ("nvfp4", "x.weight_global_scale", float("nan"), "nan is no divisor"),
        ("nvfp4", "x.weight_scale", float("nan"), "72 scales are not finite numbers"),
        ("mxfp8", "x.weight_scale", 255, "a scale of 255 is no number"),
    ],
)
def test_scales_that_are_no_numbers_are_refused(
    kind: str, name: str, value: float, message: str, tmp_path: Path
) -> None:
    stored, _ = compressed(kind)
    damaged = torch.full(stored[name].shape, value).to(stored[name].dtype)
    weight = opened(tmp_path / "m.safetensors", stored | {name: damaged}, compressed_weights)
    with pytest.raises(InputRefused, match=message):
        weight.rows(slice(0, 1))
