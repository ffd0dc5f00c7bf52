"""A merge into a checkpoint: the residual beside it, and what the caller is told of the base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lora_export as le
from lora_export.errors import InputRefused, WrongUsage
from support.api import an_adapter, base_weights


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    base_weights(tmp_path / "base" / "model.safetensors")
    an_adapter(tmp_path / "adapter")
    return tmp_path


def test_the_notes_tell_of_code_of_other_weights_and_of_another_base(place: Path) -> None:
    config = {"auto_map": {"AutoModel": "code.Model"}, "_name_or_path": "org/small"}
    (place / "base" / "config.json").write_text(json.dumps(config))
    (place / "base" / "pytorch_model.bin").write_bytes(b"others")
    recorded = json.loads((place / "adapter" / "adapter_config.json").read_text())
    named = json.dumps({**recorded, "base_model_name_or_path": "org/large"})
    (place / "adapter" / "adapter_config.json").write_text(named)
    result = le.merge(place / "base", place / "adapter", place / "out")
    found = "\n".join(result.notes)
    assert "adapter was made for org/large, the base is org/small: shapes that agree prove nothing" in found
    assert "names code of its own (auto_map:" in found
    assert "pytorch_model.bin contains weights too, unmerged ones; it is left out" in found


def test_a_residual_is_kept_beside_the_output(place: Path) -> None:
    seen: list[str] = []
    residual = place / "residual"
    result = le.merge(place / "base", place / "adapter", place / "out", keep_residual=residual, on_message=seen.append)
    assert result.residual_bytes == residual.stat().st_size > 0
    assert any("with it and the adapters, `unmerge()` makes the base again" in line for line in seen)
    with pytest.raises(WrongUsage, match="is the output or inside it"):
        le.merge(place / "base", place / "adapter", place / "o", keep_residual=place / "o" / "r")


def test_only_a_quantised_base_is_dequantised(place: Path) -> None:
    with pytest.raises(InputRefused, match=r"is not quantised\. Leave dequantize= out"):
        le.merge(place / "base", place / "adapter", place / "out", dequantize=True)
