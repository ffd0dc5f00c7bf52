"""What may name a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_export.errors import InputRefused
from lora_export.models.model_names import refuse_no_model


def test_folders_factories_and_files_name_models(tmp_path: Path) -> None:
    for name in ("m.onnx", "m.pt2"):
        (tmp_path / name).touch()
    for source in (
        tmp_path,
        tmp_path / "m.onnx",
        tmp_path / "m.pt2",
        "package.module:factory",
        f"{tmp_path}/f.py:make",
    ):
        refuse_no_model(source)


@pytest.mark.parametrize("source", ["nothing", "nothing/", "m.py:", ":make", "m.safetensors"])
def test_anything_else_names_none(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputRefused, match=r"is no model: give a Hugging Face folder that exists"):
        refuse_no_model(source)


@pytest.mark.parametrize("name", ["m.onnx", "m.pt2"])
def test_a_file_that_is_missing_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=rf"there is no model at .*{name}"):
        refuse_no_model(tmp_path / name)
