"""The file of a residual: streams within bounds, and what is no such file."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from lora_export.errors import InputRefused
from lora_export.weights.residuals.archive import FACTS, ResidualWriter, facts_as_bytes, open_residual

PLAIN = {"hashing": "sha256", "adapters": [], "settings": {}, "shards": {}, "files": {}}


def written(path: Path, facts: bytes = facts_as_bytes(PLAIN), **members: bytes) -> Path:
    with ResidualWriter(path) as writer:
        for name, data in members.items():
            with writer.member(name) as write:
                write(data[:2])
                write(data[2:])
        writer.write(FACTS, facts)
    return path


def test_members_come_back_as_streams(tmp_path: Path) -> None:
    with open_residual(written(tmp_path / "r", data=b"abcdef")) as residual:
        assert residual.facts["hashing"] == "sha256" and residual.read("data") == b"abcdef"
        with residual.stream("data") as read:
            assert (read(4), read(4), read(4)) == (b"abcd", b"ef", b"")


def test_equal_residuals_have_equal_bytes(tmp_path: Path) -> None:
    one, other = (written(tmp_path / name, data=b"x" * 999).read_bytes() for name in ("a", "b"))
    assert one == other and len(one) < 999


def test_a_member_is_not_read_beyond_its_limit(tmp_path: Path) -> None:
    # A bomb: a thousand times as large as its file.
    path = written(tmp_path / "r", data=bytes(50_000_000))
    assert path.stat().st_size < 100_000
    with open_residual(path) as residual, pytest.raises(InputRefused, match="has more than 1,000 bytes"):
        residual.read("data", 1000)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (b"{", "is not JSON"),
        (b'{"format": 1}', "has no hashing and no adapters"),
        (b'{"format": 2, "made_by": "later"}', "is a residual of format 2, made by later; this version reads format 1"),
    ],
)
def test_facts_that_are_none_are_refused(tmp_path: Path, facts: bytes, message: str) -> None:
    path = written(tmp_path / "r", facts)
    with pytest.raises(InputRefused, match=message), open_residual(path):
        pass


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r").write_bytes(b"text")
    with (
        pytest.raises(InputRefused, match="is not a residual of a merge \\(keep_residual="),
        open_residual(tmp_path / "r"),
    ):
        pass
    with pytest.raises(InputRefused, match=r"is not a residual of .*: it is a folder"), open_residual(tmp_path):
        pass
    with zipfile.ZipFile(tmp_path / "z", "w") as archive:
        archive.writestr("other", b"")
    with pytest.raises(InputRefused, match=r"has no residual.json"), open_residual(tmp_path / "z"):
        pass
    with pytest.raises(InputRefused), open_residual(tmp_path):
        pass


def test_a_damaged_member_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "r", data=bytes(range(256)) * 9)
    data = bytearray(path.read_bytes())
    data[60] ^= 255
    path.write_bytes(data)
    with open_residual(path) as residual, pytest.raises(InputRefused, match="is damaged: data"):
        residual.read("data")


def test_an_archive_with_any_byte_changed_is_read_or_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "r", data=b"abc")
    good, outcomes = path.read_bytes(), set()
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x09]) + good[position + 1 :])
        try:
            with open_residual(path) as residual:
                outcomes.add(residual.read("data"))
        except InputRefused as refused:
            outcomes.add(str(refused)[:1])
    assert outcomes == {b"abc", "/"}
