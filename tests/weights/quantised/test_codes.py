"""The numbers of every scheme as codes: the decoder's weights, the bytes of the file, and the nearest codes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lora_export.weights.quantised.codes import FLOAT8_VALUES, INT8_VALUES, PackedRows, StoredCodes, nearest_among
from lora_export.weights.quantised.packed_numbers import FLOAT4_VALUES, pack, unpack
from lora_export.weights.quantised.reading import find_quantised
from support.quantised import OpenedWeight, parts_in
from support.quantised_weights import WEIGHTS, quantised


def opened(kind: str, path: Path) -> tuple[OpenedWeight, StoredCodes, np.ndarray]:
    """A weight, its codes, and its packed bytes."""
    stored, config = quantised(kind)
    parts = parts_in(path, stored)
    (tensor,) = find_quantised(parts.shards, config or {"quant_method": "comfyui"}, "float32").values()
    file = parts.shards[path.name]
    assert tensor.codes is not None
    return OpenedWeight(tensor, file), tensor.codes, file.read(tensor.packed).reshape(-1).view(np.uint8)


def blocks(codes: StoredCodes) -> Iterator[slice]:
    """Some rows at a time, the last block smaller."""
    step = codes.layout.rows_together * (1 if codes.layout.rows_together > 1 else 5)
    for first in range(0, codes.shape[0], step):
        yield slice(first, min(first + step, codes.shape[0]))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_codes_are_the_weight_and_its_bytes(kind: str, tmp_path: Path) -> None:
    weight, codes, packed = opened(kind, tmp_path / "m.safetensors")
    grid, after, found = codes.load(), np.empty_like(packed), []
    position = 0
    for rows in blocks(codes):
        first, last = codes.layout.extent(rows)
        assert first == position
        numbers = codes.layout.unpack(rows, packed[first:last])
        assert numbers.shape == (rows.stop - rows.start, codes.shape[1])
        found.append(codes.weight(numbers, *grid(rows)))
        after[first:last] = packed[first:last]
        codes.layout.pack(numbers, after[first:last])
        changed = packed[first:last].copy()
        codes.layout.pack((len(codes.values) - 1 - numbers).astype(np.uint8), changed)
        assert np.array_equal(codes.layout.unpack(rows, changed), len(codes.values) - 1 - numbers)
        position = last
    assert position == packed.size and np.array_equal(after, packed)
    tensor = weight.tensor
    whole = np.concatenate(found)
    if codes.is_turned:
        experts = tensor.row_shape[0] // tensor.shape[-2]
        whole = whole.reshape(experts, *tensor.shape[-2:][::-1]).transpose(0, 2, 1)
    expected = weight.whole.astype(np.float32)
    if kind == "bitsandbytes int8":  # its own products have two factors, one after the other
        np.testing.assert_allclose(whole.reshape(tensor.shape), expected, rtol=2e-7)
    else:
        assert np.array_equal(whole.reshape(tensor.shape).astype(tensor.dtype).astype(np.float32), expected)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_nearest_code_is_the_nearest_value(kind: str, tmp_path: Path) -> None:
    _, codes, packed = opened(kind, tmp_path / "m.safetensors")
    rows = slice(0, codes.shape[0])
    old, (scales, zeros) = codes.layout.unpack(rows, packed), codes.load()(rows)
    before = codes.weight(old, scales, zeros)
    assert np.array_equal(codes.nearest(before.copy(), scales, zeros, old), old)
    step = np.maximum(2 * scales, np.abs(before) / 8)  # floats of 8 bits have larger steps where they are large
    target = before + np.random.default_rng(0).normal(size=before.shape).astype(np.float32) * step
    found = codes.nearest(target.copy(), scales, zeros, old)
    values = codes.values.astype(np.float64)
    points = 0 if zeros is None else np.asarray(zeros, np.float64)
    every = np.stack([(value - points) * scales.astype(np.float64) for value in values[np.isfinite(values)]])
    least = np.abs(every - target).min(axis=0)
    chosen = (values[found] - points) * scales.astype(np.float64)
    assert (np.abs(chosen - target) <= least * (1 + 1e-6)).all()
    assert (found != old).mean() > 0.5


@pytest.mark.parametrize("values", [FLOAT8_VALUES, INT8_VALUES, FLOAT4_VALUES])
def test_equal_values_keep_their_code_and_the_ends_hold(values: np.ndarray) -> None:
    layout = PackedRows(8, len(values), len(values))
    codes = StoredCodes((1, len(values)), False, values, layout, lambda: lambda _: (np.ones((1, 1), np.float32), None))
    every = np.arange(len(values), dtype=np.uint8)[None]
    is_number = np.isfinite(values)
    one = np.ones((1, 1), np.float32)
    found = codes.nearest(values[None].copy(), one, None, every)
    assert np.array_equal(found[:, is_number], every[:, is_number])  # -0 too
    for number in (-1e9, 1e9):
        (code,) = np.unique(codes.nearest(np.full((1, len(values)), number, np.float32), one, None, every * 0))
        assert values[code] == (np.nanmax(values) if number > 0 else np.nanmin(values))
    nothing = np.zeros((1, 1), np.float32)
    assert np.array_equal(codes.nearest(values[None] + 1, nothing, None, every), every)  # no value of it is nearer


@pytest.mark.parametrize(
    "values", [[3.0], [1, 1], [0, 1], [0, 1, 1 + 2**-20, 5], [np.nan, 2, -2, 0.5], list(np.linspace(-1, 1, 16) ** 3)]
)
def test_search_among_any_values_finds_the_nearest(values: list[float]) -> None:
    table = np.array(values, np.float32)
    numbers = np.concatenate([table[np.isfinite(table)], np.random.default_rng(0).normal(size=1000) * 2])
    numbers = numbers.astype(np.float32)
    found = table[nearest_among(table)(numbers)].astype(np.float64)
    least = np.nanmin(np.abs(table.astype(np.float64)[:, None] - numbers), axis=0)
    assert (np.abs(found - numbers) <= least + 1e-6).all()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 31])
def test_packing_is_the_inverse_and_leaves_the_rest(bits: int, count: int) -> None:
    rng = np.random.default_rng(bits)
    numbers = rng.integers(0, 1 << bits, (3, count)).astype(np.uint8)
    words = rng.integers(0, 1 << 32, (3, 8), dtype=np.uint32)
    before = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    pack(numbers, bits, words.view(np.uint8))
    assert np.array_equal(unpack(words, bits, count), numbers)
    after = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    assert np.array_equal(after[:, count * bits :], before[:, count * bits :])
