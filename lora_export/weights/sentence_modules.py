"""The modules of a sentence-transformers folder: what is computed from the tokens of a text, one after another.

`modules.json` lists them. The first is a model of transformers beside this file; each other one has a folder of its
own, with a config and, where it has any, its weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export.errors import InputRefused
from lora_export.isolation.limits import MAX_JSON
from lora_export.storage import input_files, json_files
from lora_export.weights.weight_files import MODULES_FILE

TRANSFORMER = "Transformer"
TRANSFORMER_CONFIG = "sentence_bert_config.json"
MODULE_CONFIG = "config.json"
PACKAGE = "sentence_transformers."
ALONE = "To use the transformer alone, name a copy of the folder without modules.json"

_NAME = re.compile(r"\w+")


@dataclass(frozen=True)
class SentenceModule:
    """One of the modules that follow the transformer."""

    name: str  # before the names of its tensors: `2` of `2.linear.weight`
    kind: str  # the class in sentence-transformers, without its package
    folder: Path

    def config(self) -> dict[str, Any]:
        """What its config states; nothing where it has none."""
        path = self.folder / MODULE_CONFIG
        return json_files.read_json(path) if path.is_file() else {}


def sentence_modules(folder: Path) -> tuple[SentenceModule, ...] | None:
    """The modules after the transformer of a sentence-transformers folder; None where the folder is none.

    Reads modules.json alone. Raises InputRefused where it is damaged, names classes of another package, or has no
    transformer beside it.
    """
    path = folder / MODULES_FILE
    if not path.is_file():
        return None
    text = input_files.read_text(path, MAX_JSON)
    entries = json_files.parse_json(f'{{"modules": {text}}}', path)["modules"]
    if not isinstance(entries, list) or not entries:
        raise InputRefused(f"{path} lists no modules")
    first, *others = [_module(path, entry) for entry in entries]
    if first.kind != TRANSFORMER:
        raise InputRefused(f"{path} begins with {first.kind}. Only a {TRANSFORMER} is supported there. {ALONE}")
    if first.folder != folder:
        raise InputRefused(
            f"{path} has its transformer in {first.folder.name}, a folder of its own. Load the model in "
            "sentence-transformers and save it again: that stores the transformer beside modules.json"
        )
    names = [module.name for module in others]
    if len(set(names)) < len(names) or any(module.folder == folder for module in others):
        raise InputRefused(f"{path} has two modules of one name, or in one folder")
    return tuple(others)


def module_folders(folder: Path) -> list[Path]:
    """The folders of the modules after the transformer; none where `sentence_modules` refuses the folder."""
    try:
        return [module.folder for module in sentence_modules(folder) or ()]
    except InputRefused:
        return []


def _module(path: Path, entry: Any) -> SentenceModule:
    name, place, kind = (entry.get(key) if isinstance(entry, dict) else None for key in ("name", "path", "type"))
    if not (isinstance(name, str) and isinstance(place, str) and isinstance(kind, str) and _NAME.fullmatch(name)):
        raise InputRefused(f"{path} has an entry without a name, a path and a type: {entry!r}")
    if place != Path(place).name or place == "..":
        raise InputRefused(f"{path} may only name folders beside it, and names {place!r}")
    if not kind.startswith(PACKAGE):
        raise InputRefused(
            f"{path} names code of its own ({kind}), which lora-export never runs. Build the model in a factory, "
            f"`file.py:factory`, where you trust it. {ALONE}"
        )
    return SentenceModule(name, kind.rpartition(".")[2], path.parent / place)
