"""The tokenizer in a folder. Nothing is downloaded, and no code of the folder is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_export.errors import InputRefused
from lora_export.models.processors import open_processor

# One of them is in every folder that transformers reads a tokenizer from.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def open_tokenizer(folder: Path, *, needed: bool) -> Any:
    """The tokenizer of transformers in a folder; None where there is none and it is not needed.

    Raises InputRefused where it is needed and missing or damaged, and EnvironmentLacking without transformers.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        if needed:
            raise InputRefused(
                f"{folder} has no tokenizer (tokenizer.json and the like). Save it there: "
                f"transformers.AutoTokenizer.from_pretrained(NAME).save_pretrained({str(folder)!r})"
            )
        return None
    failure = f"{folder}: the tokenizer cannot be read"
    return open_processor("AutoTokenizer", folder, needs="a tokenizer needs", failure=failure)
