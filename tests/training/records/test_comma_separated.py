"""Rows of .csv files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from lora_export.errors import InputRefused
from lora_export.training.records.comma_separated import CsvRows


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
