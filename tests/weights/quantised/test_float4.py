"""4-bit floats and powers of two, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lora_export.errors import InputRefused
from lora_export.weights.quantised.float4 import powers_of_two, unpack_floats


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
