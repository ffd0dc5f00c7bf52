"""4-bit floats and powers of two, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_export.errors import InputRefused
from lora_export.weights.quantised.packed_numbers import powers_of_two, unpack, unpack_floats, words_of


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
