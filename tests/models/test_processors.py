"""Tokenizers and the like of a folder: opened by transformers, or refused in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lora_export.errors import EnvironmentLacking, InputRefused
from lora_export.models.processors import open_processor


def opened(folder: Path) -> object:
    return open_processor("AutoImageProcessor", folder, needs="images need", failure=f"{folder} has none")


def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputRefused) as refused:
        opened(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path} has none: ") and "\n" not in str(refused.value)


def test_transformers_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EnvironmentLacking, match=r"images need transformers: pip install 'lora-export\[hf\]'"):
        opened(tmp_path)


def test_the_class_of_transformers_reads_the_folder(tmp_path: Path) -> None:
    import transformers

    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    assert opened(tmp_path).size["height"] == 8  # type: ignore[attr-defined]
