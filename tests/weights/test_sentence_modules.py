"""The modules that a sentence-transformers folder lists."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_export.errors import InputRefused
from lora_export.weights.sentence_modules import module_folders, sentence_modules

Entries = list[dict[str, Any]]


def entries() -> Entries:
    kinds = {"": "base.modules.transformer.Transformer", "1_Pooling": "models.Pooling", "2_Dense": "models.Dense"}
    return [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.{kind}"}
        for number, (path, kind) in enumerate(kinds.items())
    ]


def folder_with(content: Any, folder: Path) -> Path:
    (folder / "modules.json").write_text(json.dumps(content))
    return folder


def test_modules_after_the_transformer_are_found(tmp_path: Path) -> None:
    found = sentence_modules(folder_with(entries(), tmp_path))
    assert found is not None
    assert [(module.name, module.kind) for module in found] == [("1", "Pooling"), ("2", "Dense")]
    assert module_folders(tmp_path) == [tmp_path / "1_Pooling", tmp_path / "2_Dense"]
    assert found[0].config() == {}


def test_another_folder_has_none(tmp_path: Path) -> None:
    assert sentence_modules(tmp_path) is None
    assert module_folders(tmp_path) == []


REFUSED: dict[str, Callable[[Entries], Any]] = {
    "code of its own": lambda modules: modules[1].update(type="custom_st.Pooling"),
    "begins with CLIPModel": lambda modules: modules[0].update(type="sentence_transformers.models.CLIPModel"),
    "only name folders beside it": lambda modules: modules[2].update(path="../elsewhere"),
    "in 0_Transformer, a folder of its own": lambda modules: modules[0].update(path="0_Transformer"),
    "two modules of one name": lambda modules: modules[2].update(name="1"),
    "or in one folder": lambda modules: modules[2].update(path=""),
    "without a name, a path and a type": lambda modules: modules[2].pop("type"),
    "lists no modules": lambda modules: modules.clear(),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_understood_is_refused(tmp_path: Path, message: str) -> None:
    modules = entries()
    REFUSED[message](modules)
    with pytest.raises(InputRefused, match=message):
        sentence_modules(folder_with(modules, tmp_path))
    assert module_folders(tmp_path) == []
