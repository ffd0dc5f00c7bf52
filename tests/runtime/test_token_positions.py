"""Positions of tokens: of all, or of those that the mask counts."""

from __future__ import annotations

import numpy as np

from lora_export.runtime.token_positions import token_positions

MASK = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0]])


def test_all_positions_count() -> None:
    assert token_positions(MASK, by_mask=False).tolist() == [[0, 1, 2, 3]] * 3


def test_only_the_ones_of_the_mask_count() -> None:
    assert token_positions(MASK, by_mask=True).tolist() == [[0, 1, 2, 3], [-1, 0, 1, 2], [0, 1, -1, -1]]
