"""A manifest records every file, and detects every later change."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from lora_export.errors import InputRefused
from lora_export.storage.manifest import MANIFEST, damage, read_manifest, write_manifest


def test_a_manifest_records_the_size_and_hash_of_every_file(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a").write_bytes(b"abc")
    write_manifest(tmp_path, {"base": {"model": "1234"}})
    assert read_manifest(tmp_path) == {
        "base": {"model": "1234"},
        "files": {"sub/a": {"bytes": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}},
    }


def test_a_missing_manifest_is_empty_and_a_damaged_one_is_refused(tmp_path):
    assert read_manifest(tmp_path) == {}
    (tmp_path / MANIFEST).write_text('{"files": []}')
    with pytest.raises(InputRefused, match=r"lora_export\.json is not a manifest"):
        read_manifest(tmp_path)


def with_manifest(tmp_path: Path, hashes: dict[str, dict[str, str]] | None = None) -> Path:
    (tmp_path / "sub").mkdir(parents=True)
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "sub/b").write_bytes(b"bcd")
    write_manifest(tmp_path, {}, hashes or {})
    return tmp_path


def test_every_difference_from_the_manifest_is_reported(tmp_path):
    folder = with_manifest(
        tmp_path / "out", {"a": {"xxh3_128": "06b05ab6733a618578af5f94892f3950"}}
    )  # from XXH3's own examples
    assert damage(folder) == []
    (folder / "a").write_bytes(b"abd")
    assert damage(folder) == ["a contains other bytes than were written"]
    (folder / "a").write_bytes(b"abcd")
    (folder / "sub/b").unlink()
    assert damage(folder) == ["a has 4 bytes, 3 were written", "sub/b is missing"]


def test_one_wrong_hash_of_several_is_damage(tmp_path):
    right, wrong = hashlib.sha256(b"abc").hexdigest(), "0" * 32
    folder = with_manifest(tmp_path / "out", {"a": {"sha256": right, "xxh3_128": wrong}})
    assert damage(folder) == ["a contains other bytes than were written"]


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "has no lora_export.json to compare it with"),
        ("{}", "has no lora_export.json to compare it with"),
        ('{"files": {"a": {"bytes": 3, "md4": "00"}}}', "records no hash of a that this version knows"),
        ('{"files": {"a": "abc"}}', "records no hash of a that this version knows"),
    ],
)
def test_a_folder_without_known_hashes_cannot_be_checked(tmp_path, manifest, message):
    folder = with_manifest(tmp_path / "out")
    (folder / MANIFEST).unlink()
    if manifest:
        (folder / MANIFEST).write_text(manifest)
    with pytest.raises(InputRefused, match=message):
        damage(folder)


@pytest.mark.parametrize("name", ["/proc/version", "../secret", "sub/../../secret", "link"])
def test_files_outside_the_folder_are_not_read(tmp_path, name):
    folder = with_manifest(tmp_path / "out")
    (tmp_path / "secret").write_bytes(b"abc")
    (folder / "link").symlink_to(tmp_path / "secret")
    digest = hashlib.sha256(b"abc").hexdigest()
    (folder / MANIFEST).write_text(json.dumps({"files": {name: {"bytes": 3, "sha256": digest}}}))
    with pytest.raises(InputRefused, match=f"names '{name}', which is outside the folder"):
        damage(folder)
