"""Rows of .parquet files and of folders that `datasets` saved."""

from __future__ import annotations

import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lora_export.errors import EnvironmentLacking, InputRefused
from lora_export.training.records.arrow import ParquetRows, SavedDataset

ROWS = {"text": ["one", "two", "three"], "label": [1, 0, None], "tags": [["a"], [], ["b", "c"]]}


def test_parquet_rows_are_mapped_by_number(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table(ROWS), tmp_path / "a.parquet", row_group_size=2)
    rows = ParquetRows(tmp_path / "a.parquet")
    assert len(rows) == 3 and rows.where(1) == "row 2"
    assert rows[1] == {"text": "two", "label": 0, "tags": []}
    assert rows[2] == {"text": "three", "tags": ["b", "c"]}  # what is null is missing


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
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    saved = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "splits")
    datasets.DatasetDict({"test": saved}).save_to_disk(tmp_path / "test_only")
    rows = SavedDataset(tmp_path / "one")
    assert [rows[0], rows[1]] == [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}]
    assert len(SavedDataset(tmp_path / "splits")) == 2
    assert len({rows.sha256, SavedDataset(tmp_path / "splits").sha256}) == 2
    with pytest.raises(InputRefused, match="no split `train`; give one of test as a folder"):
        SavedDataset(tmp_path / "test_only")
    (tmp_path / "one/state.json").write_text("{")
    with pytest.raises(InputRefused, match="no folder that `datasets` can load"):
        SavedDataset(tmp_path / "one")


@pytest.mark.parametrize("package", ["pyarrow", "datasets"])
def test_a_missing_package_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EnvironmentLacking, match=rf"needs {package} .*pip install 'lora-export\[data\]'"):
        (ParquetRows if package == "pyarrow" else SavedDataset)(tmp_path / "a.parquet")
