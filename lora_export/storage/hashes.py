"""Hashes of files, by the algorithms that manifests name."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from xxhash import xxh3_128

from lora_export.errors import InputRefused

FAST = "xxh3_128"  # the algorithm where none is chosen
SHORT_HASH = 12  # characters of a hash that a message shows
HASH_BLOCK = 1 << 20  # bytes read at a time
ENDING_ALGORITHM = FAST
MARK = b"lora_export.xxh3"  # before the hash
ENDING = len(MARK) + 16  # bytes


class Hash(Protocol):
    """The methods that the hashes of hashlib and xxhash have in common."""

    def update(self, data: Any, /) -> None: ...
    def hexdigest(self) -> str: ...


# XXH3 (https://xxhash.com) detects every accident, at the speed of memory. SHA-256 is what sha256sum and model hubs
# show, and what a signature should be made of. On a large model, SHA-256 costs more than the merge.
ALGORITHMS: dict[str, Callable[[], Hash]] = {FAST: xxh3_128, "sha256": hashlib.sha256}


def file_hash(path: Path, algorithm: str, most: int | None = None) -> str:
    """Return the hash of a file's bytes as hex, or of the first `most` of them. `algorithm` is a key of ALGORITHMS."""
    value = ALGORITHMS[algorithm]()
    left = sys.maxsize if most is None else most
    with path.open("rb") as file:
        while block := file.read(min(HASH_BLOCK, left)):
            value.update(block)
            left -= len(block)
    return value.hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hex."""
    return file_hash(path, "sha256")


# --- A hash at the end of a file whose format ends before it: damage is detected, and other readers skip it ---


def append_hash(path: Path) -> None:
    """Append the hash of all bytes of a file to it."""
    ending = MARK + bytes.fromhex(file_hash(path, ENDING_ALGORITHM))
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
    if MARK + bytes.fromhex(file_hash(path, ENDING_ALGORITHM, size - ENDING)) != ending:
        raise InputRefused(f"{path} is damaged: its contents are not those that were written. Write or copy it again")
    return True
