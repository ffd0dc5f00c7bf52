"""What a folder has beside a model: tokenizers and the like, opened by transformers' own classes."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from lora_export.errors import EnvironmentLacking, InputRefused


def open_processor(auto_class: str, folder: Path, *, needs: str, failure: str) -> Any:
    """Open what a folder has by one of transformers' Auto classes, offline and without code of the folder.

    Raises EnvironmentLacking without transformers, with `needs` ("sounds need") before its name, and InputRefused, with
    `failure` before the cause, for what is missing or damaged.
    """
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise EnvironmentLacking(f"{needs} transformers: pip install 'lora-export[hf]'") from error
    try:
        return getattr(transformers, auto_class).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a damaged file raises any type
        raise InputRefused(f"{failure}: {str(error).strip().split(chr(10))[0]}") from error
