"""The stored tensors of a quantised weight, read within bounds and when they are needed; packed numbers by hand."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_export.errors import InputRefused
from lora_export.storage import safetensors_file
from lora_export.storage.safetensors_file import Entry
from lora_export.weights.quantised.packed_numbers import unpack, unpack_floats, words_of
from lora_export.weights.quantised.stored_parts import (
    LOADED_AT_ONCE,
    Decode,
    Pieces,
    QuantisedTensor,
    StoredParts,
    powers_of_two,
    refuse_damaged_scales,
)


def parts_of(folder: Path) -> StoredParts:
    files = {"a.safetensors": {"x": np.uint8([1, 2])}, "b.safetensors": {"s": np.float32([[0.5], [2], [4]])}}
    for name, tensors in files.items():
        safetensors_file.write(folder / name, tensors)
    return StoredParts({name: safetensors_file.open_file(folder / name) for name in files})


def unchanged_bytes() -> Decode:
    return lambda rows, packed: packed


def test_parts_are_found_in_any_file(tmp_path: Path) -> None:
    parts = parts_of(tmp_path)
    assert list(parts.names()) == ["x", "s"] and parts.find("y") is None
    found = parts.find("s")
    assert found is not None and found.shape == (3, 1)
    assert parts.present("s", "y", "x") == ("s", "x")
    assert parts.expect("s", "x", "float32", count=3) == found == parts.expect("s", "x", most=3)
    assert parts.read("s").tolist() == [[0.5], [2], [4]]
    assert parts.read_rows("s", slice(1, 3)).tolist() == [[2], [4]]


def test_part_that_does_not_fit_is_refused_by_its_header(tmp_path: Path) -> None:
    parts = parts_of(tmp_path)
    with pytest.raises(InputRefused, match="x is quantised, and y, which belongs to it, is missing"):
        parts.expect("y", "x", "float32")
    with pytest.raises(InputRefused, match="s: its dtype is float32, and x needs uint8 or int8"):
        parts.expect("s", "x", "uint8", "int8")
    with pytest.raises(InputRefused, match="x: 2 elements, and w needs 1"):
        parts.expect("x", "w", "uint8", most=1)
    with pytest.raises(InputRefused, match="x: 2 elements, and w needs 3"):
        parts.expect("x", "w", "uint8", count=3)


def test_file_that_became_shorter_is_refused(tmp_path: Path) -> None:
    parts = parts_of(tmp_path)
    os.truncate(tmp_path / "b.safetensors", (tmp_path / "b.safetensors").stat().st_size - 4)
    with pytest.raises(InputRefused, match="became shorter"):
        parts.read_rows("s", slice(2, 3))


def test_scales_that_are_no_numbers_are_refused() -> None:
    refuse_damaged_scales("s", np.float32([1, 2]))
    with pytest.raises(InputRefused, match="s: 2 scales are not finite numbers"):
        refuse_damaged_scales("s", np.float32([np.nan, 1, np.inf]))


def test_weight_has_the_bytes_of_its_packed_numbers() -> None:
    dtype = np.dtype(np.float16)
    tensor = QuantisedTensor("w", (4, 6), dtype, "w", (), "nf4", unchanged_bytes)
    entry = tensor.entry(Entry("w", np.dtype(np.uint8), (12, 1), 100, 112))
    assert entry == Entry("w", dtype, (4, 6), 100, 112) and entry.row_bytes == 3


def test_experts_are_the_rows_of_one_matrix() -> None:
    tensor = QuantisedTensor("w", (2, 3, 5), np.dtype(np.float16), "w", (), "mxfp4", unchanged_bytes)
    assert tensor.row_shape == (6, 5)
    assert tensor.rows_in((2, 3, 5), slice(1, 2)) == slice(3, 6)
    assert tensor.rows_in((6, 5), slice(1, 2)) == slice(1, 2)


def test_packed_bytes_are_read_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(100)))
    own = QuantisedTensor("w", (4, 6), np.dtype(np.float16), "w", (), "x", unchanged_bytes)
    columns = QuantisedTensor(
        "w", (4, 6), np.dtype(np.float16), "w", (), "x", unchanged_bytes,
        pieces=lambda rows: [Pieces(rows.start, 2, number=3, step=10), Pieces(50, 1)],
    )  # fmt: skip
    with path.open("rb") as file:
        assert own.read(path, file.fileno(), 8, 24, slice(1, 3)).tolist() == list(range(14, 26))
        found = columns.read(path, file.fileno(), 8, 24, slice(1, 3)).tolist()
    assert found == [9, 10, 19, 20, 29, 30, 58]


def test_scales_of_few_weights_are_in_memory() -> None:
    loads: list[str] = []

    def tensor(name: str) -> QuantisedTensor:
        def load() -> Decode:
            loads.append(name)
            return unchanged_bytes()

        return QuantisedTensor(name, (1, 1), np.dtype(np.float16), name, (), "x", load)

    weights = [tensor(str(number)) for number in range(LOADED_AT_ONCE + 1)]
    assert not loads
    for weight in weights:
        weight.decode(slice(0, 1), np.uint8([1]))
        weight.decode(slice(0, 1), np.uint8([1]))
    assert loads == [str(number) for number in range(LOADED_AT_ONCE + 1)]
    weights[0].decode(slice(0, 1), np.uint8([1]))  # its scales had to make room
    assert loads[-1] == "0"


def test_sixteen_codes_are_the_numbers_of_e2m1() -> None:
    codes = np.uint8([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE])
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    found = unpack_floats(codes)
    assert found.tolist() == positive + [-value for value in positive]
    assert np.signbit(found).tolist() == [False] * 8 + [True] * 8  # a zero has its sign too


def test_scale_is_two_to_the_byte_minus_127() -> None:
    found = powers_of_two("s", np.uint8([0, 1, 126, 127, 128, 254]))
    assert found.tolist() == [2.0**-127, 2.0**-126, 0.5, 1, 2, 2.0**127]


def test_byte_255_is_no_number() -> None:
    with pytest.raises(InputRefused, match="x_scales: a scale of 255 is no number"):
        powers_of_two("x_scales", np.uint8([127, 255]))


# --- Small integers ---


def test_numbers_begin_with_the_lowest_bits() -> None:
    words = np.array([[0x87654321, 0x0000000F]], np.uint32)
    assert unpack(words, 4, 9).tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 15]]
    assert unpack(words, 8, 5).tolist() == [[0x21, 0x43, 0x65, 0x87, 15]]
    assert unpack(words, 2, 4).tolist() == [[1, 0, 2, 0]]
    assert unpack(words, 1, 6).tolist() == [[1, 0, 0, 0, 0, 1]]


def test_number_of_three_bits_is_split_between_two_words() -> None:
    """The eleventh number has bits 30 and 31 of one word and bit 0 of the next: 3 + 4 = 7."""
    words = np.array([[0xC0000000, 0x00000001, 0]], np.uint32)
    assert unpack(words, 3, 32)[0].tolist() == [0] * 10 + [7] + [0] * 21


@settings(max_examples=80, deadline=None)
@given(bits=st.integers(1, 8), rows=st.integers(1, 4), columns=st.integers(1, 100), seed=st.integers(0, 9))
def test_any_width_is_unpacked_as_compressed_tensors_packs_it(bits: int, rows: int, columns: int, seed: int) -> None:
    low = -(1 << (bits - 1))
    numbers = torch.randint(low, -low, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    words = pack_to_int32(numbers, bits).numpy()
    assert words.shape[1] == words_of(columns, bits)
    assert (unpack(words.view(np.uint32), bits, columns).astype(np.int16) + low == numbers.numpy()).all()


@pytest.mark.parametrize(("count", "bits", "words"), [(8, 4, 1), (9, 4, 2), (32, 3, 3), (33, 3, 4), (1, 1, 1)])
def test_words_are_counted_up(count: int, bits: int, words: int) -> None:
    assert words_of(count, bits) == words
