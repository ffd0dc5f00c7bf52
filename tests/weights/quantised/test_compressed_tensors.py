"""Weights of compressed-tensors: integers and floats are bit for bit what the library makes of them.

Which format each module is stored in; formats that are refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from lora_export.errors import InputRefused
from lora_export.weights.quantised.compressed_tensors import ACTIVATION_PARTS, COMPRESSED_FORMATS, compressed_weights
from support.quantised import OpenedWeight, Tensors, bits_of, opened, parts_in

ROWS, COLUMNS, WIDE, GROUP = 12, 64, 96, 16
BLOCK = [5, 24]  # the last blocks are smaller, in both directions


def compressed(
    bits: int, strategy: str, *, symmetric: bool = True, kind: str = "int", dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensors, torch.Tensor, dict[str, Any]]:
    """The stored tensors of a weight, what the library makes of them, and the config's quantization_config."""
    torch.manual_seed(0)
    scales = {"tensor": (1,), "channel": (ROWS, 1), "group": (ROWS, COLUMNS // GROUP), "block": (3, 3)}[strategy]
    more: dict[str, Any] = {"group": {"group_size": GROUP}, "block": {"block_structure": BLOCK}}.get(strategy, {})
    args = QuantizationArgs(num_bits=bits, type=kind, strategy=strategy, symmetric=symmetric, **more)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    state = {
        "weight": torch.randn(ROWS, COLUMNS).to(dtype),
        "weight_scale": (torch.rand(scales) / 2 ** (bits - 2) + 0.01).to(dtype),
    }
    if not symmetric:
        low = -(2 ** (bits - 1))
        state["weight_zero_point"] = torch.randint(low, -low, scales, dtype=torch.int8)
    name = "pack-quantized" if bits < 8 or strategy == "group" else f"{kind}-quantized"
    compressor = BaseCompressor.get_value_from_registry(name)
    stored = compressor.compress(state, scheme)
    floats = compressor.decompress(stored, scheme)["weight"]
    config = {"format": name, "config_groups": {"group_0": {"weights": args.model_dump(mode="json")}}}
    return {f"x.{key}": value.contiguous() for key, value in stored.items()}, floats, config


def found(stored: Tensors, path: Path, config: dict[str, Any] | None = None) -> OpenedWeight:
    return opened(path, stored, compressed_weights, config, "float32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("bits", "strategy", "symmetric", "kind"),
    [
        *((bits, "group", symmetric, "int") for bits in (2, 3, 4, 5, 6, 7, 8) for symmetric in (True, False)),
        *((bits, "channel", symmetric, "int") for bits in (3, 4, 8) for symmetric in (True, False)),
        (8, "tensor", True, "int"),
        (8, "block", True, "int"),
        (8, "channel", True, "float"),
        (8, "tensor", True, "float"),
        (8, "block", True, "float"),
    ],
)
def test_weights_are_the_library_s_bit_for_bit(
    bits: int, strategy: str, symmetric: bool, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    stored, expected, config = compressed(bits, strategy, symmetric=symmetric, kind=kind, dtype=dtype)
    weight = found(stored, tmp_path / "m.safetensors", config)
    assert (weight.tensor.name, weight.tensor.shape) == ("x.weight", (ROWS, COLUMNS))
    assert {*weight.tensor.parts, weight.tensor.packed} == stored.keys()
    assert expected.dtype == dtype and len(expected.unique()) > 2
    for rows in (slice(0, ROWS), slice(3, 7), slice(ROWS - 1, ROWS)):
        # The sign of a zero: a number minus its zero point is -0 nowhere, in the library's integers or in our floats.
        assert bits_of(weight.rows(rows)) == bits_of(expected[rows])


def test_columns_may_be_in_any_group(tmp_path: Path) -> None:
    stored, expected, _ = compressed(4, "group", dtype=torch.float32)
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(0))
    groups = (torch.arange(COLUMNS) // GROUP)[order].int()
    weight = found(stored | {"x.weight_g_idx": groups}, tmp_path / "m.safetensors")
    scales = stored["x.weight_scale"]
    numbers = expected / scales.repeat_interleave(GROUP, 1)
    assert bits_of(weight.whole) == bits_of(numbers.round() * scales[:, groups.long()])


OF_INTEGERS = [
    ({"x.weight_shape": torch.tensor([ROWS, 999])}, "of 8 words are not 12 rows of 999 numbers of 4 or 8 bits"),
    ({"x.weight_shape": torch.tensor([ROWS + 1, COLUMNS])}, "12 rows of 8 words are not 13 rows"),
    ({"x.weight_shape": torch.tensor([ROWS, -1])}, "is no packed matrix"),
    ({"x.weight_shape": torch.tensor([ROWS, 1 << 60])}, "is no packed matrix"),
    ({"x.weight_shape": torch.tensor([ROWS])}, "1 elements, and x.weight needs 2"),
    ({"x.weight_packed": torch.zeros(ROWS, 8)}, "its dtype is float32"),
    ({"x.weight_packed": torch.zeros(2, ROWS, 8).int()}, "is no packed matrix"),
    ({"x.weight_scale": torch.ones(ROWS - 1, 4)}, r"the shape \[11, 4\] does not fit a weight of \[12, 64\]"),
    ({"x.weight_scale": torch.ones(ROWS, 5)}, "does not fit"),
    ({"x.weight_scale": torch.ones(ROWS, 0)}, "does not fit"),
    ({"x.weight_g_idx": torch.zeros(3, dtype=torch.int32)}, "3 elements, and x.weight needs 64"),
    ({"x.weight_g_idx": torch.full((COLUMNS,), 4, dtype=torch.int32)}, "a column is in none of the 4 groups"),
    ({"x.weight_zero_point": torch.zeros(1, 4, dtype=torch.int32)}, "4 elements, and x.weight needs 8"),
    ({"x.weight_scale": torch.full((ROWS, 4), torch.inf)}, "48 scales are not finite numbers"),
    ({"y.weight_scale": torch.ones(1)}, r"y\.weight_scale scales a matrix of int8 or 8-bit floats, which is"),
]
OF_NVFP4 = [
    ({"x.weight_scale": torch.ones(ROWS, 3).to(torch.float8_e4m3fn)}, "are none of nvfp4, mxfp4, mxfp6, mxfp8"),
    ({"x.weight_scale": torch.ones(ROWS - 1, 6).to(torch.float8_e4m3fn)}, "are none of nvfp4"),
    ({"x.weight_scale": torch.ones(ROWS, 0).to(torch.float8_e4m3fn)}, "are none of nvfp4"),
    ({"x.weight_scale": torch.ones(ROWS, 6)}, "its dtype is float32, and x.weight needs uint8 or float8_e4m3fn"),
    ({"x.weight_global_scale": torch.ones(2)}, "2 elements, and x.weight needs 1"),
    ({"x.weight_zero_point": torch.ones(ROWS, 6)}, "nvfp4 has no zero points"),
]


@pytest.mark.parametrize(
    ("kind", "change", "message"), [*(("int", *row) for row in OF_INTEGERS), *(("nvfp4", *row) for row in OF_NVFP4)]
)
def test_parts_that_do_not_fit_are_refused(kind: str, change: Tensors, message: str, tmp_path: Path) -> None:
    stored = in_groups(kind)[0] if kind == "nvfp4" else compressed(4, "group")[0]
    with pytest.raises(InputRefused, match=message):
        found(stored | change, tmp_path / "m.safetensors").rows(slice(0, 1))


def test_rotated_inputs_are_refused(tmp_path: Path) -> None:
    stored, _, config = compressed(4, "group")
    assert found(stored, tmp_path / "a.safetensors", config | {"transform_config": {"config_groups": {}}})
    rotated = {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}
    with pytest.raises(InputRefused, match="rotates weights and the inputs of its layers"):
        found(stored, tmp_path / "a.safetensors", config | {"transform_config": {"config_groups": {"R4": rotated}}})


def test_blocks_without_their_size_are_refused(tmp_path: Path) -> None:
    stored, _, config = compressed(8, "block", kind="float")
    with pytest.raises(InputRefused, match=r"the shape \[3, 3\] does not fit"):
        found(stored, tmp_path / "a.safetensors")
    config["config_groups"]["group_0"]["weights"]["block_structure"] = [0, 24]
    with pytest.raises(InputRefused, match="and not two positive numbers"):
        found(stored, tmp_path / "b.safetensors", config)


# One module of each kind; what they become is tested with each format.
MODULES: dict[str, Tensors] = {
    "4-bit integers": {
        "weight_packed": torch.zeros(4, 4, dtype=torch.int32),
        "weight_shape": torch.tensor([4, 32]),
        "weight_scale": torch.ones(4, 1),
    },
    "8-bit integers": {"weight": torch.zeros(4, 32, dtype=torch.int8), "weight_scale": torch.ones(4, 1)},
    "8-bit floats": {"weight": torch.zeros(4, 32).to(torch.float8_e4m3fn), "weight_scale": torch.ones(1)},
    "nvfp4": {
        "weight_packed": torch.zeros(4, 16, dtype=torch.uint8),
        "weight_scale": torch.ones(4, 2).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.ones(1),
    },
    "mxfp8": {
        "weight": torch.zeros(4, 32).to(torch.float8_e4m3fn),
        "weight_scale": torch.ones(4, 1, dtype=torch.uint8),
    },
}


def stored(*kinds: str) -> Tensors:
    return {f"{kind}.{name}": value for kind in kinds for name, value in MODULES[kind].items()}


def test_one_model_may_have_several_formats(tmp_path: Path) -> None:
    parts = parts_in(tmp_path / "m.safetensors", stored(*MODULES) | {"norm.weight": torch.ones(4)})
    found = compressed_weights(parts, {"format": "mixed-precision"}, "bfloat16")
    assert {name: tensor.scheme for name, tensor in found.items()} == {f"{kind}.weight": kind for kind in MODULES}


def test_scales_of_activations_belong_to_the_weight(tmp_path: Path) -> None:
    more = {f"{kind}.{name}": torch.ones(1) for kind in MODULES for name in ("input_scale", "output_scale")}
    parts = parts_in(tmp_path / "m.safetensors", stored(*MODULES) | more)
    found = compressed_weights(parts, {}, "bfloat16")
    assert set(more) == {name for tensor in found.values() for name in tensor.parts if name in more}
    assert "input_global_scale" in ACTIVATION_PARTS


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"format": "marlin-24"}, "marlin-24"),
        ({"format": "mixed-precision", "config_groups": {"a": {"format": "sparse-bitmask"}}}, "sparse-bitmask"),
    ],
)
def test_other_formats_are_refused_by_name(fields: dict[str, object], name: str, tmp_path: Path) -> None:
    parts = parts_in(tmp_path / "m.safetensors", stored("nvfp4"))
    with pytest.raises(InputRefused, match=f"pack-quantized, .*mxfp8-quantized of .* this base has {name}"):
        compressed_weights(parts, fields, "bfloat16")


def test_every_format_that_the_library_writes_is_read() -> None:
    from compressed_tensors.compressors import BaseCompressor

    assert {*COMPRESSED_FORMATS, "dense"} == set(BaseCompressor.registered_names())


# --- Floats in groups ---

GROUPED = {
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp6": "mxfp6-pack-quantized",
    "mxfp8": "mxfp8-quantized",
}


def in_groups(kind: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensors, torch.Tensor]:
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
    weight = torch.randn(ROWS, WIDE).to(dtype)
    largest = weight.float().reshape(ROWS, -1, group).abs().amax(-1)
    state = {"weight": weight}
    if kind == "nvfp4":
        state["weight_global_scale"] = torch.tensor([448 * 6 / float(largest.max())])
        state["weight_scale"] = (largest / 6 * state["weight_global_scale"]).to(torch.float8_e4m3fn).to(dtype)
    else:
        state["weight_scale"] = torch.exp2(torch.floor(torch.log2(largest)) - (2 if bits < 8 else 8)).to(dtype)
    compressor = BaseCompressor.get_value_from_registry(GROUPED[kind])
    stored = compressor.compress(state, scheme)
    floats = compressor.decompress(stored, scheme)["weight"]
    assert 0 < float((floats.float() - weight.float()).norm() / weight.float().norm()) < 0.2
    return {f"x.{key}": value.contiguous() for key, value in stored.items()}, floats


@pytest.mark.parametrize("kind", GROUPED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_floats_are_the_library_s_bit_for_bit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    stored, expected = in_groups(kind, dtype)
    weight = opened(tmp_path / "m.safetensors", stored, compressed_weights, {"format": GROUPED[kind]})
    tensor = weight.tensor
    assert (tensor.name, tensor.shape, tensor.scheme, str(tensor.dtype)) == ("x.weight", (12, 96), kind, "bfloat16")
    assert {*tensor.parts, tensor.packed} == stored.keys()
    for rows in (slice(0, ROWS), slice(3, 5), slice(ROWS - 1, ROWS)):
        assert bits_of(weight.rows(rows)) == bits_of(expected[rows])


@pytest.mark.parametrize("kind", ["mxfp4", "mxfp6", "mxfp8"])
def test_smallest_and_largest_powers_are_the_library_s(kind: str, tmp_path: Path) -> None:
    stored, _ = in_groups(kind)
    scales = torch.tensor([0, 1, 3, 7, 120, 245], dtype=torch.uint8).repeat(6, 1)
    stored["x.weight_scale"] = scales.reshape(ROWS, 3)
    args = QuantizationArgs(num_bits=int(kind[-1]), type="float", strategy="group", symmetric=True, group_size=32)
    own = {name.removeprefix("x."): value for name, value in stored.items()}
    compressor = BaseCompressor.get_value_from_registry(GROUPED[kind])
    expected = compressor.decompress(own, QuantizationScheme(targets=["Linear"], weights=args))["weight"]
    weight = opened(tmp_path / "m.safetensors", stored, compressed_weights)
    assert torch.isfinite(expected).all() and bits_of(weight.whole) == bits_of(expected)


@pytest.mark.parametrize("name", ["x.weight_scale", "x.weight_global_scale"])
def test_missing_part_is_refused_by_name(name: str, tmp_path: Path) -> None:
    stored, _ = in_groups("nvfp4")
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
    stored, _ = in_groups(kind)
    damaged = torch.full(stored[name].shape, value).to(stored[name].dtype)
    weight = opened(tmp_path / "m.safetensors", stored | {name: damaged}, compressed_weights)
    with pytest.raises(InputRefused, match=message):
        weight.rows(slice(0, 1))
