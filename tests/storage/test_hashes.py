"""Hashes of files are those of the standard tools."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lora_export.storage.hashes import HASH_BLOCK, file_hash, file_sha256


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_hash(tmp_path / "abc", "xxh3_128") == "06b05ab6733a618578af5f94892f3950"  # from XXH3's own examples


def test_a_file_of_several_blocks_is_hashed_whole(tmp_path: Path) -> None:
    data = bytes(2 * HASH_BLOCK) + b"end"
    (tmp_path / "large").write_bytes(data)
    assert file_sha256(tmp_path / "large") == hashlib.sha256(data).hexdigest()
