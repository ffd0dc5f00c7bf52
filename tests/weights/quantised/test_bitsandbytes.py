"""Weights of bitsandbytes as floats: bit for bit what the library makes of them on a CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import load_file, save_file

from lora_export.errors import InputRefused
from lora_export.storage import safetensors_file
from lora_export.weights.quantised.bitsandbytes import bitsandbytes_weights
from lora_export.weights.quantised.stored_parts import StoredParts
from support.quantised import OpenedWeight, Tensors, bits_of, opened

# A block of 64 numbers begins in the middle of a row. With 96 columns bitsandbytes 0.50.2 itself is wrong on a CPU.
SHAPE = (24, 100)


def in_4_bits(kind: str = "nf4", dtype: torch.dtype = torch.bfloat16, *, double: bool = True) -> tuple[Tensors, Any]:
    """The stored tensors of a weight, and what the library makes of them."""
    torch.manual_seed(0)
    weight = torch.randn(SHAPE, dtype=dtype) * torch.logspace(-3, 0, SHAPE[0])[:, None].to(dtype)
    packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=double, blocksize=64)
    stored = {"x.weight": packed, **{f"x.weight.{name}": part for name, part in state.as_dict(packed=True).items()}}
    return stored, functional.dequantize_4bit(packed, state)


def in_8_bits() -> tuple[Tensors, Any]:
    torch.manual_seed(0)
    weight = torch.randint(-127, 128, SHAPE, dtype=torch.int8)
    scales = torch.rand(SHAPE[0]) + 0.1
    stored = {"x.weight": weight, "x.SCB": scales, "x.weight_format": torch.tensor(0, dtype=torch.uint8)}
    return stored, functional.int8_vectorwise_dequant(weight, scales)


def found(stored: Tensors, path: Path, dtype: str = "float32") -> OpenedWeight:
    return opened(path, stored, bitsandbytes_weights, {}, dtype)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_4_bits_are_the_library_s_bit_for_bit(kind: str, double: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    stored, expected = in_4_bits(kind, dtype, double=double)
    weight = found(stored, tmp_path / "m.safetensors")
    tensor = weight.tensor
    assert (tensor.shape, tensor.scheme, str(tensor.dtype)) == (SHAPE, kind, str(dtype).removeprefix("torch."))
    assert set(tensor.parts) == stored.keys() - {"x.weight"}
    for own in (slice(0, 24), slice(0, 1), slice(5, 8), slice(23, 24)):
        # Only the sign of a zero may differ: at this shape the library makes -0 of one index of fp4. `x + 0` has none.
        rows = weight.rows(own)
        assert bits_of((rows + 0).astype(rows.dtype)) == bits_of(expected[own] + 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_is_the_library_s_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    stored, expected = in_8_bits()
    weight = found(stored, tmp_path / "m.safetensors", dtype)
    assert (weight.tensor.scheme, set(weight.tensor.parts)) == ("int8", {"x.SCB", "x.weight_format"})
    assert bits_of(weight.rows(slice(3, 20))) == bits_of(expected[3:20].to(getattr(torch, dtype)))


STATE = "x.weight.quant_state.bitsandbytes__nf4"


def with_state(stored: Tensors, **fields: Any) -> Tensors:
    state = json.loads(bytes(stored[STATE].numpy().tobytes())) | fields
    return stored | {STATE: torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "x.weight.absmax"}, "x.weight.absmax, which belongs to it, is"),
        (lambda s: {k: v for k, v in s.items() if k != "x.weight"}, "its packed numbers are missing"),
        (lambda s: s | {"x.weight": s["x.weight"][:-1]}, "1199 bytes, and"),
        (lambda s: s | {"x.weight.absmax": s["x.weight.absmax"][1:]}, "37 elements, and x.weight needs 38"),
        (lambda s: s | {"x.weight.absmax": s["x.weight.absmax"].float()}, "its dtype is float32"),
        (lambda s: s | {"x.weight.quant_map": torch.zeros(17)}, "17 elements, and x.weight needs 16"),
        (lambda s: s | {"x.weight.nested_quant_map": torch.zeros(255)}, "255 elements, and x.weight needs 256"),
        (lambda s: s | {STATE: torch.zeros(4, dtype=torch.uint8)}, "JSON"),
        (lambda s: with_state(s, shape=[24, "100"]), "is not that of a matrix"),
        (lambda s: with_state(s, shape=[1 << 40, 100]), "1200 bytes, and"),
        (lambda s: with_state(s, shape=[2400, 1]), "do not end with a byte"),
        (lambda s: with_state(s, dtype="int8"), "is no float"),
        (lambda s: with_state(s, blocksize=0), "the block size 0 is no positive number"),
        (lambda s: with_state(s, nested_blocksize=-1), "the nested scales are described by -1"),
        (lambda s: with_state(s, nested_offset="NaN"), "the nested scales are described by 256 and 'NaN'"),
    ],
)  # fmt: skip
def test_damaged_parts_are_refused_by_name(damage: Callable[[Tensors], Tensors], message: str, tmp_path: Path) -> None:
    stored, _ = in_4_bits()
    with pytest.raises(InputRefused, match=message):
        found(damage(stored), tmp_path / "m.safetensors")


def test_damaged_int8_is_refused_by_name(tmp_path: Path) -> None:
    stored, _ = in_8_bits()
    with pytest.raises(InputRefused, match=r"23 elements, and x\.weight needs 24"):
        found(stored | {"x.SCB": stored["x.SCB"][1:]}, tmp_path / "a.safetensors")
    with pytest.raises(InputRefused, match=r"x\.SCB scales a matrix of int8, which is missing"):
        found({"x.SCB": stored["x.SCB"]}, tmp_path / "b.safetensors")
    with pytest.raises(InputRefused, match="only the row-major format"):
        found(stored | {"x.weight_format": torch.tensor(1, dtype=torch.uint8)}, tmp_path / "c.safetensors")


@pytest.mark.parametrize("double", [False, True])
def test_scales_that_are_no_numbers_are_refused(double: bool, tmp_path: Path) -> None:
    stored, _ = in_4_bits(double=double)
    name = "x.weight.nested_absmax" if double else "x.weight.absmax"
    damaged = stored[name].clone()
    damaged[0] = float("nan")
    weight = found(stored | {name: damaged}, tmp_path / "m.safetensors")
    with pytest.raises(InputRefused, match=f"{name}: 1 scales are not finite numbers"):
        weight.rows(slice(0, 1))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_packed_bytes_may_be_stored_as_floats(storage: torch.dtype, tmp_path: Path) -> None:
    """As `bnb_4bit_quant_storage` stores them, so that FSDP can shard them."""
    stored, expected = in_4_bits()
    weight = found(
        stored | {"x.weight": stored["x.weight"].reshape(-1).view(storage)[:, None]}, tmp_path / "m.safetensors"
    )
    assert bits_of(weight.rows(slice(2, 9))) == bits_of(expected[2:9])


def test_parts_may_lie_in_another_file(tmp_path: Path) -> None:
    stored, expected = in_4_bits()
    save_file({"x.weight": stored["x.weight"]}, tmp_path / "a.safetensors")
    save_file({name: part for name, part in stored.items() if name != "x.weight"}, tmp_path / "b.safetensors")
    shards = {name: safetensors_file.open_file(tmp_path / name) for name in ("a.safetensors", "b.safetensors")}
    tensor = bitsandbytes_weights(StoredParts(shards), {}, "float32")["x.weight"]
    packed = load_file(tmp_path / "a.safetensors")["x.weight"].numpy().reshape(-1)
    assert tensor.decode(slice(0, 24), packed).tobytes() == bits_of(expected)
