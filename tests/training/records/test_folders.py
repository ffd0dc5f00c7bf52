"""Folders of texts, and of images by class."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_export.errors import InputRefused
from lora_export.training.records import folders
from lora_export.training.records.folders import DescribedSounds, ImagesByClass, open_folder


def files(folder: Path, **contents: bytes) -> Path:
    for name, content in contents.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def test_every_text_file_is_a_row(tmp_path: Path) -> None:
    rows = open_folder(files(tmp_path, b_dot_py=b"x = 1\n", a__c_dot_txt="ä".encode(), _dot_hidden=b"no"))
    assert [rows.where(row) for row in range(len(rows))] == ["a/c.txt", "b.py"]
    assert [rows[row] for row in range(2)] == [{"text": "ä"}, {"text": "x = 1\n"}]
    before = rows.sha256
    files(tmp_path, b_dot_py=b"x = 2\n")
    assert open_folder(tmp_path).sha256 != before


def test_images_have_the_class_of_their_folder(tmp_path: Path) -> None:
    rows = open_folder(files(tmp_path, cat__1_dot_PNG=b"", dog__old__2_dot_jpg=b""))
    assert isinstance(rows, ImagesByClass)
    assert [rows[row]["label"] for row in range(2)] == ["cat", "dog"]
    assert rows[1]["image"] == tmp_path / "dog/old/2.jpg"


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_sounds_are_named_by_their_metadata(name: str, tmp_path: Path) -> None:
    metadata = b"file_name,transcription\na.wav,one\nsub/b.flac,two\n"
    if name.endswith("jsonl"):
        metadata = b'{"file_name": "a.wav", "text": "one"}\n{"file_name": "sub/b.flac", "text": "two"}\n'
    rows = open_folder(files(tmp_path, a_dot_wav=b"", sub__b_dot_flac=b"", **{name.replace(".", "_dot_"): metadata}))
    assert isinstance(rows, DescribedSounds) and rows.path == tmp_path
    assert [rows[row] for row in range(len(rows))] == [
        {"audio": "a.wav", "text": "one"},
        {"audio": "sub/b.flac", "text": "two"},
    ]
    assert rows.where(1) == f"{name}, line {3 if name.endswith('csv') else 2}"
    before = rows.sha256
    (tmp_path / name).write_bytes(metadata.replace(b"two", b"too"))
    assert open_folder(tmp_path).sha256 != before


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({}, "contains no files"),
        ({"a_dot_png": b""}, r"in no folder of a class:\n  a\.png"),
        ({"a_dot_wav": b""}, r"has sounds, and no metadata\.csv or metadata\.jsonl with the columns file_name and"),
        ({"cat__a_dot_png": b"", "cat__b_dot_txt": b""}, r"has 1 images, and other files:\n  cat/b\.txt"),
    ],
)
def test_folders_of_neither_kind_are_refused(tmp_path: Path, contents: dict[str, bytes], message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        open_folder(files(tmp_path, **contents))


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = open_folder(files(tmp_path, a_dot_txt=b"abc\xff", b_dot_txt=b"long enough"))
    with pytest.raises(InputRefused, match=r"a\.txt is not UTF-8: byte 3"):
        rows[0]
    monkeypatch.setattr(folders, "MAX_ROW", 5)
    with pytest.raises(InputRefused, match=r"b\.txt has more than 5 bytes"):
        rows[1]
