"""Adapters in NumPy's archives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lora_export import formats
from lora_export.errors import InputRefused

A, B = np.array([[1.0, 2]]), np.array([[1.0], [2], [3]])


def test_pairs_have_the_scale_of_the_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{"fc.lora_A": A, "fc.lora_B": B, "scale": np.float32(2)})
    adapter = formats.load(tmp_path / "a.npz")
    assert adapter.format == "npz" and adapter.pairs["fc"].delta().tolist() == [[2, 4], [4, 8], [6, 12]]


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{"fc.lora_A": A, "scale": np.float32(2)})
    with pytest.raises(InputRefused, match=r"fc\.lora_B"):
        formats.load(tmp_path / "a.npz")
