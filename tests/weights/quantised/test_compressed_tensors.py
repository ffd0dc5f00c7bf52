"""Weights of compressed-tensors as floats: bit for bit what the library makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

from lora_export.errors import InputRefused
from lora_export.storage import safetensors_file
from lora_export.weights.quantised.compressed_tensors import compressed_weights
from lora_export.weights.quantised.stored_parts import QuantisedTensor, StoredParts

ROWS, COLUMNS, GROUP = 12, 64, 16
Tensors = dict[str, torch.Tensor]


def compressed(
    bits: int, strategy: str, *, symmetric: bool = True, kind: str = "int", dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensors, torch.Tensor]:
    """The stored tensors of a weight, and what the library makes of them."""
    torch.manual_seed(0)
    scales = {"tensor": (1,), "channel": (ROWS, 1), "group": (ROWS, COLUMNS // GROUP)}[strategy]
    group = {"group_size": GROUP} if strategy == "group" else {}
    args = QuantizationArgs(num_bits=bits, type=kind, strategy=strategy, symmetric=symmetric, **group)
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
    return {f"x.{key}": value.contiguous() for key, value in stored.items()}, floats


def found(stored: Tensors, path: Path, **fields: Any) -> QuantisedTensor:
    save_file(stored, path)
    parts = StoredParts({path.name: safetensors_file.open_file(path)})
    (tensor,) = compressed_weights(parts, fields, "float32").values()
    return tensor


def rows_of(tensor: QuantisedTensor, stored: Tensors, rows: slice) -> bytes:
    packed = stored[tensor.packed].view(torch.uint8).numpy()
    return tensor.decode(rows, packed[rows].reshape(-1)).tobytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("bits", "strategy", "symmetric", "kind"),
    [
        (4, "group", True, "int"),
        (4, "group", False, "int"),
        (4, "channel", True, "int"),
        (8, "group", True, "int"),
        (8, "group", False, "int"),
        (8, "channel", True, "int"),
        (8, "channel", False, "int"),
        (8, "tensor", True, "int"),
        (8, "channel", True, "float"),
        (8, "tensor", True, "float"),
    ],
)
def test_weights_are_the_library_s_bit_for_bit(
    bits: int, strategy: str, symmetric: bool, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    stored, expected = compressed(bits, strategy, symmetric=symmetric, kind=kind, dtype=dtype)
    tensor = found(stored, tmp_path / "m.safetensors")
    assert (tensor.name, tensor.shape) == ("x.weight", (ROWS, COLUMNS))
    assert {*tensor.parts, tensor.packed} == stored.keys()
    assert expected.dtype == dtype
    for rows in (slice(0, ROWS), slice(3, 5), slice(ROWS - 1, ROWS)):
        # The sign of a zero: a number minus its zero point is -0 nowhere, in the library's integers or in our floats.
        assert rows_of(tensor, stored, rows) == expected[rows].contiguous().view(torch.uint8).numpy().tobytes()


def test_columns_may_be_in_any_group(tmp_path: Path) -> None:
    stored, expected = compressed(4, "group", dtype=torch.float32)
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(0))
    groups = (torch.arange(COLUMNS) // GROUP)[order].int()
    tensor = found(stored | {"x.weight_g_idx": groups}, tmp_path / "m.safetensors")
    scales = stored["x.weight_scale"]
    numbers = expected / scales.repeat_interleave(GROUP, 1)
    by_hand = (numbers.round() * scales[:, groups.long()]).numpy().tobytes()
    assert rows_of(tensor, stored, slice(0, ROWS)) == by_hand


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x.weight_shape": torch.tensor([ROWS, 999])}, "rows of 8 words are not 999 numbers of 4 or 8 bits"),
        ({"x.weight_shape": torch.tensor([ROWS + 1, COLUMNS])}, "rows of 8 words are not"),
        ({"x.weight_packed": torch.zeros(ROWS, 8)}, "is no packed matrix"),
        ({"x.weight_scale": torch.ones(ROWS - 1, 4)}, r"the shape \[11, 4\] does not fit a weight of \[12, 64\]"),
        ({"x.weight_scale": torch.ones(ROWS, 5)}, "does not fit"),
        ({"x.weight_scale": torch.ones(ROWS, 0)}, "does not fit"),
        ({"x.weight_g_idx": torch.zeros(3, dtype=torch.int32)}, "the groups of the columns has 3 elements"),
        ({"x.weight_g_idx": torch.full((COLUMNS,), 4, dtype=torch.int32)}, "a column is in none of the 4 groups"),
        ({"x.weight_zero_point": torch.zeros(1, 4, dtype=torch.int32)}, "the packed zero points has 4 elements"),
        (
            {"y.weight_scale": torch.ones(1)},
            r"y\.weight_scale scales a matrix of int8 or 8-bit floats, which is missing",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: Tensors, message: str, tmp_path: Path) -> None:
    stored, _ = compressed(4, "group")
    with pytest.raises(InputRefused, match=message):
        found(stored | change, tmp_path / "m.safetensors")


def test_other_formats_are_refused_by_name(tmp_path: Path) -> None:
    stored, _ = compressed(4, "group")
    with pytest.raises(InputRefused, match=r"pack-quantized.* and this base has nvfp4-pack-quantized"):
        found(stored, tmp_path / "m.safetensors", format="nvfp4-pack-quantized")
    groups = {"group_0": {"format": "mxfp4-pack-quantized"}}
    with pytest.raises(InputRefused, match="this base has mxfp4-pack-quantized"):
        found(stored, tmp_path / "m.safetensors", format="mixed-precision", config_groups=groups)
