"""A hash at the end of a file whose format ends before it: damage is detected, and other readers skip it."""

from __future__ import annotations

from pathlib import Path

from lora_export.errors import InputRefused
from lora_export.storage.hashes import file_hash

ALGORITHM = "xxh3_128"
MARK = b"lora_export.xxh3"  # before the hash
ENDING = len(MARK) + 16  # bytes


def append_hash(path: Path) -> None:
    """Append the hash of all bytes of a file to it."""
    ending = MARK + bytes.fromhex(file_hash(path, ALGORITHM))
    with path.open("ab") as file:
        file.write(ending)


def agrees_with_hash(path: Path) -> bool:
    """Whether a file has its hash at its end. Raises InputRefused where that is not the hash of the bytes before it."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - ENDING))
        ending = file.read(ENDING)
    if not ending.startswith(MARK):
        return False
    if MARK + bytes.fromhex(file_hash(path, ALGORITHM, size - ENDING)) != ending:
        raise InputRefused(f"{path} is damaged: its contents are not those that were written. Write or copy it again")
    return True
