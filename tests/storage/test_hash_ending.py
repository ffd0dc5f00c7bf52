"""A hash at the end of a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_export.errors import InputRefused
from lora_export.storage.hash_ending import ENDING, agrees_with_hash, append_hash


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
