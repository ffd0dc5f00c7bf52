"""What may name a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_export.errors import InputRefused
from lora_export.models.model_names import refuse_no_model


def is_refused(source: str | Path) -> bool:
    try:
        refuse_no_model(source)
    except InputRefused:
        return True
    return False


def test_folders_factories_and_programs_name_models(tmp_path: Path) -> None:
    sources = (tmp_path, "m.pt2", "package.module:factory", "f.py:make", tmp_path / "no folder")
    assert list(map(is_refused, sources)) == [False, False, False, False, True]


@pytest.mark.parametrize("source", ["nothing", "nothing/", "m.py:", ":make", "m.safetensors", "m.onnx"])
def test_anything_else_names_none(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputRefused, match=r"is no model: give a Hugging Face folder that exists"):
        refuse_no_model(source)
