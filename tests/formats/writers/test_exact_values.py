"""Values without rounding: the smallest type that holds them, alphas, and what a format cannot hold."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_export.errors import InputRefused
from lora_export.formats.writers.exact_values import alpha_of, beyond_pairs, refuse_inexpressible, smallest_dtype
from lora_export.lora import TokenRows
from support.written import adapter_of, low_rank


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1.0, 2.5], ml_dtypes.bfloat16),
        ([2.0**120], ml_dtypes.bfloat16),
        ([1 + 2**-10], np.float16),  # of 10 bits, where bfloat16 has 7
        ([2.0**120, 1 + 2**-10], np.float32),
        ([math.pi], np.float32),
    ],
)
def test_the_smallest_type_that_holds_all_values(values: list[float], dtype: Any) -> None:
    assert smallest_dtype([np.array(values, np.float32)]) == dtype


@given(st.integers(1, 512), st.integers(1, 1024) | st.floats(0.01, 1000))
def test_an_alpha_gives_its_scale_again(rank: int, alpha: float) -> None:
    assert alpha_of(alpha / rank, rank) / rank == alpha / rank


@given(st.integers(1, 512), st.floats(1e-3, 1e3))
def test_any_scale_has_an_alpha_that_float32_cannot_tell(rank: int, scale: float) -> None:
    assert np.float32(alpha_of(scale, rank) / rank) == pytest.approx(np.float32(scale), rel=2**-23)


def test_what_is_no_pair_is_named() -> None:
    vector = np.ones(2, np.float32)
    adapter = adapter_of(
        {"fc": low_rank(2, 2, 1, magnitude=vector)},
        replaced={"head.weight": np.ones((2, 2))},
        biases={"fc": vector},
        token_rows={"embed.weight": TokenRows(np.array([1]), np.ones((1, 2)))},
        tied={"lm_head": "embed"},
    )
    assert beyond_pairs(adapter) == [
        "fc: DoRA's magnitude",
        "head.weight: a whole tensor",
        "fc: a change of a bias",
        "embed.weight: rows of tokens",
        "lm_head: the repetition of the pair of another module",
    ]
    assert beyond_pairs(adapter, {"magnitude", "replaced", "biases", "token_rows", "tied"}) == []
    with pytest.raises(InputRefused, match=r"the format x cannot express everything in mine:\n  fc: a change"):
        refuse_inexpressible(adapter, "x", ["fc: a change of a bias"])
    refuse_inexpressible(adapter, "x", [])
