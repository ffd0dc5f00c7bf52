"""Columns under other names."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_export.errors import InputRefused
from lora_export.training.records.rows import with_columns
from lora_export.training.records.text_rows import JsonLines


@pytest.fixture
def rows(tmp_path: Path) -> JsonLines:
    (tmp_path / "a.jsonl").write_text('{"body": "a", "text": "b", "n": 1}\n{"n": 2}\n')
    return JsonLines(tmp_path / "a.jsonl")


def test_a_renamed_column_hides_another_of_its_name(rows: JsonLines) -> None:
    renamed = with_columns(rows, {"text": "body", "label": "n"})
    assert dict(renamed[0]) == {"text": "a", "label": 1}
    assert dict(renamed[1]) == {"label": 2}
    assert (len(renamed), renamed.where(1), renamed.path, renamed.sha256) == (2, "line 2", rows.path, rows.sha256)
    assert with_columns(rows, {}) is rows


def test_an_unknown_column_is_refused_with_the_known_ones(rows: JsonLines) -> None:
    with pytest.raises(InputRefused, match=r"a\.jsonl has no column bodi; it has body, text, n"):
        with_columns(rows, {"text": "bodi"})
