"""Open a data set by its path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from lora_export.errors import InputRefused, listed
from lora_export.storage.input_files import must_exist
from lora_export.training.records.arrow import DATASET_FILES, ParquetRows, SavedDataset
from lora_export.training.records.comma_separated import CsvRows
from lora_export.training.records.folders import TextFiles, open_folder
from lora_export.training.records.json_lines import JsonLines
from lora_export.training.records.rows import Records, with_columns

ROW_READERS: Mapping[str, Callable[[Path], Records]] = {".jsonl": JsonLines, ".csv": CsvRows, ".parquet": ParquetRows}
DATA_FORMATS = (
    ".jsonl, .csv and .parquet (with columns such as `text` and `label`), .npz (with the model's inputs and `labels`), "
    "a folder of text files, of images by class, of sounds with metadata.csv, or of a saved `datasets` data set, and "
    "`file.py:factory`"
)


def open_records(path: Path, columns: Mapping[str, str] | None = None) -> Records:
    """Open a file or folder of rows. `columns` renames: the name that the program reads -> the name in the data.

    Raises InputRefused where it cannot be read, has no rows or lacks a column, and EnvironmentLacking where a package
    is missing.
    """
    must_exist(path, "data")
    if path.is_dir():
        is_saved = any((path / name).is_file() for name in DATASET_FILES)
        records: Records = SavedDataset(path) if is_saved else _opened_folder(path)
    elif (reader := ROW_READERS.get(path.suffix.lower())) is None:
        raise InputRefused(f"{path}: data are read from {DATA_FORMATS}")
    else:
        records = reader(path)
    if not len(records):
        raise InputRefused(f"{path} contains no examples")
    return with_columns(records, columns or {})


def _opened_folder(path: Path) -> Records:
    """The rows of a folder. Raises InputRefused for tables among text files: each would be one long text."""
    records = open_folder(path)
    if isinstance(records, TextFiles):
        tables = [str(file) for file in records.files if file.suffix.lower() in ROW_READERS]
        if tables:
            raise InputRefused(f"{path} contains files of rows. Name one of them as the data:", listed(tables))
    return records
