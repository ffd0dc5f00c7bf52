"""Hashes of files are those of the standard tools."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from lora_export.errors import InputRefused
from lora_export.storage.hashes import ENDING, HASH_BLOCK, agrees_with_hash, append_hash, file_hash, file_sha256


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_hash(tmp_path / "abc", "xxh3_128") == "06b05ab6733a618578af5f94892f3950"  # from XXH3's own examples


def test_a_file_of_several_blocks_is_hashed_whole(tmp_path: Path) -> None:
    data = bytes(2 * HASH_BLOCK) + b"end"
    (tmp_path / "large").write_bytes(data)
    assert file_sha256(tmp_path / "large") == hashlib.sha256(data).hexdigest()


# --- A hash at the end of a file whose format ends before it: damage is detected, and other readers skip it ---


@pytest.mark.parametrize("content", [b"", b"abc", bytes(range(256)) * 20_000])
def test_each_changed_byte_before_the_hash_is_detected(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    assert not agrees_with_hash(path)
    append_hash(path)
    whole = path.read_bytes()
    assert whole[:-ENDING] == content and agrees_with_hash(path)
    for place in sorted({0, len(content) // 2, max(0, len(content) - 1), len(whole) - 1}):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        if content or place == len(whole) - 1:
            with pytest.raises(InputRefused, match="is damaged: its contents are not those"):
                agrees_with_hash(path)


def test_a_file_that_was_cut_has_no_agreeing_hash(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 100)
    append_hash(tmp_path / "x")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
    assert not agrees_with_hash(tmp_path / "x")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[10:])
    assert not agrees_with_hash(tmp_path / "x")
