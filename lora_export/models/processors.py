"""What a folder has beside a model: tokenizers and the like, opened by transformers' own classes.

Nothing is downloaded, and no code of the folder is run.
"""

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


def optional_package(name: str, needs: str, extra: str) -> Any:
    """Import a package of an extra. Raises EnvironmentLacking without it, with `needs` ("sounds need") before it."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: a library that it loads is missing
        raise EnvironmentLacking(f"{needs} {name} ({error}): pip install 'lora-export[{extra}]'") from error


def open_processor(auto_class: str, folder: Path, *, needs: str, failure: str) -> Any:
    """Open what a folder has by one of transformers' Auto classes, offline and without code of the folder.

    Raises EnvironmentLacking without transformers, with `needs` ("sounds need") before its name, and InputRefused, with
    `failure` before the cause, for what is missing or damaged.
    """
    transformers = optional_package("transformers", needs, "hf")
    try:
        return getattr(transformers, auto_class).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a damaged file raises any type
        raise InputRefused(f"{failure}: {str(error).strip().split(chr(10))[0]}") from error


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
