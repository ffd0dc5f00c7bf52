"""Restoring in blocks: several blocks of each tensor, and memory that does not grow with the model."""

from __future__ import annotations

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import lora_export as le
from lora_export.weights.residuals import prediction
from support import peak
from support.handmade import base_file, peft_adapter

RNG = np.random.default_rng(3)


@pytest.mark.parametrize("entries", [1, 64, 1000])
def test_blocks_of_any_size_give_the_same_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    monkeypatch.setattr(prediction, "ENTRIES_AT_ONCE", entries)
    base = base_file(tmp_path / "base.safetensors", {"fc.weight": RNG.normal(size=(50, 21))}, ml_dtypes.bfloat16)
    peft_adapter(tmp_path / "one", {"fc": (RNG.normal(size=(3, 21)), 0.02 * RNG.normal(size=(50, 3)))})
    le.merge(base, tmp_path / "one", tmp_path / "out.safetensors", keep_residual=tmp_path / "r")
    result = le.unmerge(tmp_path / "out.safetensors", tmp_path / "one", tmp_path / "again", base_from=tmp_path / "r")
    assert (result.output, result.restored, result.files) == (tmp_path / "again.safetensors", 1, 1)
    assert result.output.read_bytes() == base.read_bytes()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lora_export"]
    row = RNG.normal(size=2048).astype(ml_dtypes.bfloat16)
    a, b = RNG.normal(size=(2, 2048)), 0.02 * RNG.normal(size=(2048, 2))
    peaks = []
    for count in (1, 8):  # 8 and 64 MiB of weights
        folder = tmp_path / str(count)
        folder.mkdir()
        names = [f"layer{number}" for number in range(count)]
        matrix = np.tile(row, (2048, 1))
        base_file(folder / "base.safetensors", {f"{name}.weight": matrix for name in names}, ml_dtypes.bfloat16)
        peft_adapter(folder / "one", dict.fromkeys(names, (a, b)))
        files = [folder / name for name in ("base.safetensors", "one", "out.safetensors", "r", "again.safetensors")]
        base, one, out, residual, again = files
        merged = peak.run([*command, "merge", base, one, "-o", out, "--keep-residual", residual])
        restored = peak.run([*command, "unmerge", out, one, "-o", again, "--base-from", residual])
        assert (merged.code, restored.code) == (0, 0) and again.read_bytes() == base.read_bytes()
        peaks.append((merged.peak, restored.peak))
    assert all(large - small < 24 for small, large in zip(*peaks, strict=True))
