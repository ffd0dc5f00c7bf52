"""Folders of texts, and of images by class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lora_export.errors import InputRefused
from lora_export.training.records import opening
from lora_export.training.records.opening import DescribedSounds, ImagesByClass, open_folder, open_records
from lora_export.training.row_forms import RowForm, form_of, survey


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
        ({"train__cat__a_dot_png": b"", "test__cat__b_dot_png": b""}, "give one of test, train as the folder"),
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
    monkeypatch.setattr(opening, "MAX_ROW", 5)
    with pytest.raises(InputRefused, match=r"b\.txt has more than 5 bytes"):
        rows[1]


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}]
    for name in _written_rows(rows, tmp_path):
        records = open_records(tmp_path / name)
        assert [records[row] for row in range(len(records))] == rows
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("one")
    assert open_records(tmp_path / "texts")[0] == {"text": "one"}


def test_a_column_counts_where_the_first_row_has_no_value(tmp_path: Path) -> None:
    rows = [{"text": "one", "label": None}, {"text": "two", "label": "b"}]
    for name in _written_rows(rows, tmp_path):
        records = open_records(tmp_path / name)
        assert form_of(records) is RowForm.LABELLED
        with pytest.raises(InputRefused, match=r"(row|line) [12]: `label` is (None|'')"):
            survey(records, RowForm.LABELLED)


def test_a_second_text_may_be_lacking_in_some_rows(tmp_path: Path) -> None:
    rows = [{"text": "one", "text_pair": None, "label": "a"}, {"text": "two", "text_pair": "more", "label": "b"}]
    for name in set(_written_rows(rows, tmp_path)) - {"r.CSV"}:
        assert survey(open_records(tmp_path / name), RowForm.LABELLED).classes == ("a", "b")


def _written_rows(rows: list[dict[str, Any]], tmp_path: Path) -> list[str]:
    """The names of files and of a folder with these rows, one of each format."""
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [",".join(rows[0]), *(",".join(value or "" for value in row.values()) for row in rows)]
    (tmp_path / "r.CSV").write_text("\n".join(lines) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    return ["r.jsonl", "r.CSV", "r.parquet", "saved"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jsonl", "there is no data at"),
        ("a.txt", r"a\.txt: data are read from \.jsonl, \.csv and"),
        ("empty.jsonl", "contains no examples"),
        ("empty.csv", "contains no examples"),
        ("tables", r"tables contains files of rows\. Name one of them as the data:\n  .*tables/a\.jsonl\n  .*b\.csv"),
    ],
)
def test_what_is_no_data_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "empty.csv").write_text("text,label\n")
    (tmp_path / "tables").mkdir()
    for table in ("a.jsonl", "b.csv", "c.txt"):
        (tmp_path / "tables" / table).write_text("text\n")
    with pytest.raises(InputRefused, match=message):
        open_records(tmp_path / name)
