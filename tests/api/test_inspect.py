"""`lora_export.inspect`: exactly one kind of content for a path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import lora_export as le
from lora_export.errors import InputRefused, WrongUsage
from lora_export.options.reading import ReadOptions
from support.api import an_adapter, base_weights


def test_an_adapter_is_recognised(tmp_path: Path) -> None:
    found = le.inspect(an_adapter(tmp_path / "adapter"))
    assert found.adapter is not None and list(found.adapter.pairs) == ["dense"]
    assert (found.checkpoint, found.graph, found.onnx_adapter) == (None, None, None)


def test_a_damaged_merge_is_found(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    base_weights(tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    le.merge(tmp_path / "base", an_adapter(tmp_path / "adapter"), tmp_path / "merged")
    assert le.inspect(tmp_path / "merged", check=True).checkpoint is not None
    with (tmp_path / "merged" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    with pytest.raises(InputRefused, match=r"model\.safetensors"):
        le.inspect(tmp_path / "merged", check=True)


def test_a_component_is_shown_alone(tmp_path: Path) -> None:
    pairs = {f"{module}.lora_{side}.weight": np.eye(2, dtype=np.float32) for module in ("unet.q", "text_encoder.q")
             for side in "AB"}  # fmt: skip
    save_file(pairs, tmp_path / "two.safetensors")
    found = le.inspect(tmp_path / "two.safetensors", reading=ReadOptions(component="text_encoder"))
    assert found.adapter is not None and list(found.adapter.pairs) == ["text_encoder/q"]
    with pytest.raises(InputRefused, match="has no changes for transformer_2"):
        le.inspect(tmp_path / "two.safetensors", reading=ReadOptions(component="transformer_2"))


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("missing", {}, InputRefused),
        ("adapter", {"checkpoint": "x"}, WrongUsage),
    ],
)
def test_what_cannot_be_inspected_is_refused(
    tmp_path: Path, name: str, options: dict[str, Any], error: type[Exception]
) -> None:
    an_adapter(tmp_path / "adapter")
    with pytest.raises(error):
        le.inspect(tmp_path / name, **options)
