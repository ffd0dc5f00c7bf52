"""The dtype in which a precision multiplies."""

from __future__ import annotations

import pytest
import torch

from lora_export.training.autocast import autocast


@pytest.mark.parametrize(
    ("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_products_are_in_the_dtype_of_the_precision(precision: str, dtype: torch.dtype) -> None:
    one = torch.ones(2, 2)
    with autocast("cpu", precision):  # type: ignore[arg-type]
        assert (one @ one).dtype is dtype
    assert (one @ one).dtype is torch.float32
