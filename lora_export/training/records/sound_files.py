"""Sounds that rows of data name: files beside the data, or bytes in them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.errors import InputRefused
from lora_export.models.sounds import sound_header
from lora_export.storage.hashes import file_sha256
from lora_export.training.records.rows import Records

AUDIO = "audio"  # the column


def sound_in(records: Records, value: Any) -> Path | bytes:
    """The file or the bytes of a sound: a path relative to the data, or the `bytes` or `path` of a `datasets` row.

    Raises InputRefused for a value of another kind.
    """
    if isinstance(value, Mapping):
        if isinstance(content := value.get("bytes"), bytes):
            return content
        value = value.get("path")
    if not isinstance(value, str | Path) or not str(value).strip():
        raise InputRefused(f"`{AUDIO}` is {value!r:.80}; it must be the path of a sound")
    home = records.path if records.path.is_dir() else records.path.parent
    return home / value


def sound_problem(records: Records, value: Any) -> str:
    """What is wrong with the sound of a row, from its header alone; empty where nothing is."""
    try:
        found = sound_in(records, value)
        if isinstance(found, Path) and not found.is_file():
            return f"there is no file {found}"
        return "" if sound_header(found).samples else "the sound has no samples"
    except InputRefused as error:
        return str(error)


def sha256_with_sounds(records: Records) -> str:
    """The hash of the rows and of all files that they name."""
    digest = hashlib.sha256(records.sha256.encode())
    for row in range(len(records)):
        found = sound_in(records, records[row][AUDIO])
        if isinstance(found, Path):
            digest.update(file_sha256(found).encode())
    return digest.hexdigest()
