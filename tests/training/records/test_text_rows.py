"""Rows of files and saved data sets."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lora_export.errors import EnvironmentLacking, InputRefused
from lora_export.training.records import rows
from lora_export.training.records.rows import CsvRows, JsonLines, ParquetRows, SavedDataset


def lines(path: Path, *contents: str | bytes) -> JsonLines:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in contents))
    return JsonLines(path)


def test_rows_are_read_by_number_whatever_is_between_them(tmp_path: Path) -> None:
    rows = lines(tmp_path / "a.jsonl", '\ufeff{"text": "ä"}', "", "  ", '{"text": "b", "n": [1]}\r', '{"text": "c"}')
    assert len(rows) == 3
    assert [rows[number] for number in (2, 0, 1)] == [{"text": "c"}, {"text": "ä"}, {"text": "b", "n": [1]}]
    assert [rows.where(number) for number in range(3)] == ["line 1", "line 4", "line 5"]
    assert rows.sha256 == hashlib.sha256(rows.path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"a\.jsonl, line 2: not JSON \(Expecting .*: column 2\)$"),
        ('{"text": "a" "b"}', r"line 2: not JSON \(Expecting ',' delimiter: column 14\)$"),
        (b'{"text": "\xff"}', "line 2: not UTF-8: byte 11$"),
        ("[" * 100_000, "line 2: not JSON"),
        ("[1]", "line 2: not an object"),
        ('{"text": "a", "text": "b"}', "line 2 names text more than once"),
    ],
)
def test_a_line_that_is_no_object_is_refused_when_it_is_read(tmp_path: Path, line: str | bytes, message: str) -> None:
    rows = lines(tmp_path / "a.jsonl", "{}", line)
    with pytest.raises(InputRefused, match=message):
        rows[1]


def test_an_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_ROW", 30)
    with pytest.raises(InputRefused, match=r"a\.jsonl, line 2 has more than 30 bytes"):
        lines(tmp_path / "a.jsonl", "{}", json.dumps({"text": "a" * 40}))


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_fields_may_have_quotes_and_line_breaks(tmp_path: Path) -> None:
    content = '\ufeffid,label,text\r\n1,10,"one, and\ntwö ""x"""\r\n\r\n2,9,three\r\n3,8,four'
    rows = CsvRows(written(tmp_path / "a.csv", content))
    assert rows.columns == ("id", "label", "text") and len(rows) == 3
    assert rows[2] == {"id": "3", "label": "8", "text": "four"}
    assert rows[0] == {"id": "1", "label": "10", "text": 'one, and\ntwö "x"'}
    assert [rows.where(number) for number in range(3)] == ["line 3", "line 5", "line 6"]  # where each ends
    assert rows.sha256 == hashlib.sha256(content.encode()).hexdigest()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"a\.csv has no header: its first line must name the columns"),
        ("text,label,text\n", "once, not text$"),
        ("text,label\na,x\nb\n", "line 3: 1 fields, the header has 2"),
        ('text,label\na,x\n"b"c,y\n', r"line 3: ',' expected after"),
        ('text,label\na,"x\n', "line 2: unexpected end of data"),
        (b"text,label\na,\xff\n", r"line 2 is not UTF-8: byte 3"),
    ],
)
def test_what_is_no_csv_is_refused_with_its_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        CsvRows(written(tmp_path / "a.csv", content))


ROWS = {"text": ["one", "two", "three"], "label": [1, 0, None], "tags": [["a"], [], ["b", "c"]]}


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_file_that_changed_is_not_read_on(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"a": 1}\n{"a": 2}\n')
    rows = JsonLines(tmp_path / name) if name == "a.jsonl" else CsvRows(tmp_path / name)
    (tmp_path / name).chmod(0o600)
    assert rows[0]
    (tmp_path / name).write_text("\n")
    with pytest.raises(InputRefused, match=rf"{name} changed while it was read"):
        rows[0]


def test_parquet_rows_are_mapped_by_number(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table(ROWS), tmp_path / "a.parquet", row_group_size=2)
    rows = ParquetRows(tmp_path / "a.parquet")
    assert len(rows) == 3 and rows.where(1) == "row 2"
    assert rows[1] == {"text": "two", "label": 0, "tags": []}
    assert rows[2] == {"text": "three", "label": None, "tags": ["b", "c"]}
    tools = [{"name": "f", "takes": {"x": 1}}, {"name": "g", "takes": {"y": 2}}]  # a table fills in what others have
    pyarrow.parquet.write_table(pyarrow.table({"tools": [tools]}), tmp_path / "b.parquet")
    assert ParquetRows(tmp_path / "b.parquet")[0] == {"tools": tools}


def test_the_unpacked_file_is_removed_with_its_reader(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table(ROWS), tmp_path / "a.parquet")
    rows = ParquetRows(tmp_path / "a.parquet")
    unpacked = Path(rows._folder.name)
    assert unpacked.is_dir()
    del rows
    assert not unpacked.exists()


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + b"x" * 100)
    with pytest.raises(InputRefused, match=r"a\.parquet is no \.parquet file: "):
        ParquetRows(tmp_path / "a.parquet")


def test_a_saved_dataset_gives_names_of_classes(tmp_path: Path) -> None:
    classes = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"text": datasets.Value("string"), "label": classes, "tags": datasets.List(classes)})
    saved = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0], "tags": [[0, 1], []]}, features)
    unlabelled = datasets.Dataset.from_dict({"text": ["a"], "label": [-1], "tags": [[]]}, features)
    unlabelled.save_to_disk(tmp_path / "unlabelled")
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "splits")
    datasets.DatasetDict({"test": saved}).save_to_disk(tmp_path / "test_only")
    rows = SavedDataset(tmp_path / "one")
    first = {"text": "a", "label": "yes", "tags": ["no", "yes"]}
    assert [rows[0], rows[1]] == [first, {"text": "b", "label": "no", "tags": []}]
    assert len(SavedDataset(tmp_path / "splits")) == 2
    assert len({rows.sha256, SavedDataset(tmp_path / "splits").sha256}) == 2
    with pytest.raises(InputRefused, match="unlabelled, row 1: `label` is -1, and its classes are 0 to 1"):
        SavedDataset(tmp_path / "unlabelled").read(0)
    with pytest.raises(InputRefused, match="no split `train`; give one of test as a folder"):
        SavedDataset(tmp_path / "test_only")
    (tmp_path / "one/state.json").write_text("{")
    with pytest.raises(InputRefused, match="no folder that `datasets` can load"):
        SavedDataset(tmp_path / "one")


@pytest.mark.parametrize("package", ["pyarrow", "datasets"])
def test_a_missing_package_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EnvironmentLacking, match=rf"needs {package} .*pip install '(datasets|pyarrow)>="):
        (ParquetRows if package == "pyarrow" else SavedDataset)(tmp_path / "a.parquet")
