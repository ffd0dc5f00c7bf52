"""Rows of .jsonl files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from lora_export.errors import InputRefused
from lora_export.training.records import json_lines
from lora_export.training.records.json_lines import JsonLines


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
    monkeypatch.setattr(json_lines, "MAX_ROW", 30)
    with pytest.raises(InputRefused, match=r"a\.jsonl, line 2 has more than 30 bytes"):
        lines(tmp_path / "a.jsonl", "{}", json.dumps({"text": "a" * 40}))
