"""Merged checkpoints against their base: no model, no PyTorch."""

from __future__ import annotations

from pathlib import Path

import pytest

import lora_export as le
from lora_export.errors import WrongUsage


def test_a_merged_file_is_compared_without_a_model(place: Path) -> None:
    right = le.verify(place / "merged.safetensors", base=place / "base.safetensors", adapters=place / "adapter")
    wrong = le.verify(place / "merged.safetensors", base=place / "base.safetensors", adapters=place / "stronger")
    assert right and not wrong and wrong.verdict.outcome == "different"


def test_a_combined_merge_is_compared_with_the_same_combination(place: Path, tmp_path: Path) -> None:
    adapters, how = [place / "adapter", place / "stronger"], {"combination": "linear"}
    le.merge(place / "base.safetensors", adapters, tmp_path / "out.safetensors", **how)
    found = [le.verify(tmp_path / "out.safetensors", base=place / "base.safetensors", adapters=adapters, **one)
             for one in (how, {})]  # fmt: skip
    assert found[0] and found[0].about["combine"] == {"method": "linear"}
    assert found[1].verdict.outcome == "different"


def test_base_without_an_adapter_names_the_recorded_one(place: Path) -> None:
    with pytest.raises(WrongUsage, match=r"merged\.safetensors contains `adapter`"):
        le.verify(place / "merged.safetensors", base=place / "base.safetensors")
