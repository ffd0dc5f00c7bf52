"""The tokenizer in a folder: found, absent, damaged, or with code of its own."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from lora_export.errors import EnvironmentLacking, InputRefused
from lora_export.models.tokenizer import open_tokenizer
from support.small_models import words_tokenizer


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
