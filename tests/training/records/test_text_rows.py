"""Rows of .jsonl files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from lora_export.errors import InputRefused
from lora_export.training.records import text_rows
from lora_export.training.records.text_rows import CsvRows, JsonLines


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
    ],
)
def test_a_line_that_is_no_object_is_refused_when_it_is_read(tmp_path: Path, line: str | bytes, message: str) -> None:
    rows = lines(tmp_path / "a.jsonl", "{}", line)
    with pytest.raises(InputRefused, match=message):
        rows[1]


def test_an_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_rows, "MAX_ROW", 30)
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
        ("text,label,text\n", "once, not text, label, text"),
        ("text,label\na,x\nb\n", "line 3: 1 fields, the header has 2"),
        ('text,label\na,x\n"b"c,y\n', r"line 3: ',' expected after"),
        ('text,label\na,"x\n', "line 2: unexpected end of data"),
        (b"text,label\na,\xff\n", r"line 2 is not UTF-8: byte 3"),
    ],
)
def test_what_is_no_csv_is_refused_with_its_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        CsvRows(written(tmp_path / "a.csv", content))
