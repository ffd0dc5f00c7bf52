"""Tokenizers and the like of a folder: opened by transformers, or refused in one line."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_export.errors import EnvironmentLacking, InputRefused
from lora_export.models.processors import open_processor, open_tokenizer
from support.small_models import words_tokenizer


def opened(folder: Path) -> object:
    return open_processor("AutoImageProcessor", folder, needs="images need", failure=f"{folder} has none")


def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputRefused) as refused:
        opened(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path} has none: ") and "\n" not in str(refused.value)


def test_transformers_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EnvironmentLacking, match=r"images need transformers \(.*\): pip install 'lora-export\[hf\]'"):
        opened(tmp_path)


def test_the_class_of_transformers_reads_the_folder(tmp_path: Path) -> None:
    import transformers

    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    assert opened(tmp_path).size["height"] == 8  # type: ignore[attr-defined]


def test_tokenizer_in_the_folder_is_opened(tmp_path: Path) -> None:
    assert open_tokenizer(words_tokenizer(tmp_path), needed=True)("good film")["input_ids"] == [4, 6, 2]


def test_absent_tokenizer_is_an_error_only_where_it_is_needed(tmp_path: Path) -> None:
    assert open_tokenizer(tmp_path, needed=False) is None
    with pytest.raises(InputRefused, match=r"has no tokenizer.*\.save_pretrained\('.+'\)$"):
        open_tokenizer(tmp_path, needed=True)


def test_code_of_the_folder_does_not_run(tmp_path: Path) -> None:
    words_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    try:
        open_tokenizer(tmp_path, needed=True)
    except InputRefused as refused:
        assert "tokenizer" in str(refused)
    assert not (tmp_path / "ran").exists()


def test_without_transformers_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words_tokenizer(tmp_path)
    importing = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return importing(name, *rest)

    monkeypatch.delitem(__import__("sys").modules, "transformers")
    monkeypatch.setattr("importlib.import_module", without)
    with pytest.raises(EnvironmentLacking, match=r"pip install 'lora-export\[hf\]'"):
        open_tokenizer(tmp_path, needed=True)
