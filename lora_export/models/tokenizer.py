"""The tokenizer in a folder. Nothing is downloaded, and no code of the folder is run."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from lora_export.errors import EnvironmentLacking, InputRefused

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
            raise InputRefused(f"{folder} has no tokenizer (tokenizer.json and the like)")
        return None
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise EnvironmentLacking("a tokenizer needs transformers: pip install 'lora-export[hf]'") from error
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a damaged tokenizer raises any type
        first = str(error).strip().split("\n")[0]
        raise InputRefused(f"{folder}: the tokenizer cannot be read: {first}") from error
