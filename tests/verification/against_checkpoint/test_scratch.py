"""Memory that is used again."""

from __future__ import annotations

import numpy as np

from lora_export.verification.against_checkpoint.scratch import Scratch


def test_a_name_keeps_its_memory_until_it_must_grow() -> None:
    scratch = Scratch()
    wide = scratch.array("sum", (4, 3))
    assert (wide.shape, wide.dtype) == ((4, 3), np.float64)
    small = scratch.array("sum", (2, 5), np.float32)
    assert (small.shape, small.dtype) == ((2, 5), np.float32) and np.shares_memory(wide, small)
    assert not np.shares_memory(wide, scratch.array("other", (4, 3)))
    assert not np.shares_memory(wide, scratch.array("sum", (5, 3)))
