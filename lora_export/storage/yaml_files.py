"""YAML files of trainers: tables of settings, read within bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_export.errors import InputRefused
from lora_export.storage import input_files

MAX_YAML = 1_000_000  # bytes; such files have some kilobytes


def read_yaml(path: Path) -> dict[str, Any]:
    """The table in a file, by PyYAML's safe loader: it makes plain values alone.

    Raises InputRefused for text that is not YAML, that is no table with names, and above MAX_YAML. Values may share
    parts with each other, and be larger than the file when they are printed.
    """
    import yaml  # here, because most adapters have no such file, and importing it takes 8 ms of each merge

    text = input_files.read_text(path, MAX_YAML)
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError, TypeError) as error:
        raise InputRefused(f"{path} is not YAML ({str(error).splitlines()[0][:100]})") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise InputRefused(f"{path} is not a table of settings")
    return content
