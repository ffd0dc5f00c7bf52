"""Data sets are opened by what their path is."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lora_export.errors import InputRefused
from lora_export.training.records.opening import open_records


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.CSV").write_text("text,label\none,a\ntwo,b\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for name in ("r.jsonl", "r.CSV", "r.parquet", "saved"):
        records = open_records(tmp_path / name)
        assert [records[row] for row in range(len(records))] == rows
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("one")
    assert open_records(tmp_path / "texts")[0] == {"text": "one"}


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
