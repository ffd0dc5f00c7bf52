"""Rows in Arrow's memory layout: a .parquet file (pyarrow), and a folder that `datasets` saved.

Both are mapped from the disk, so that their rows may be more than memory holds.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from lora_export.errors import InputRefused
from lora_export.models.processors import optional_package
from lora_export.storage.hashes import file_sha256
from lora_export.storage.input_files import must_be_regular, regular_files
from lora_export.training.records.rows import Row

TRAINING_SPLIT = "train"
ARROW = ("pyarrow", "pyarrow.parquet")
DATASET_FILES = ("dataset_info.json", "dataset_dict.json")  # a folder of `datasets` has one of them


class ParquetRows:
    """The rows of a .parquet file.

    The file is unpacked once into a temporary Arrow file, which is mapped: single rows of packed groups would be slow.
    """

    def __init__(self, path: Path):
        """Unpack the file. Raises InputRefused where it is damaged, and EnvironmentLacking without pyarrow."""
        must_be_regular(path)
        pyarrow, parquet = (optional_package(name, "a .parquet file needs", "data") for name in ARROW)
        self.path = path
        self.sha256 = file_sha256(path)
        self._folder = tempfile.TemporaryDirectory(prefix="lora-export-")  # removed with this object
        unpacked = Path(self._folder.name, "rows.arrow")
        try:
            with parquet.ParquetFile(path) as file, pyarrow.ipc.new_file(unpacked, file.schema_arrow) as writer:
                for group in file.iter_batches():
                    writer.write_batch(group)
        except pyarrow.ArrowException as error:
            raise InputRefused(f"{path} is no .parquet file: {str(error).strip()}") from error
        self._table = pyarrow.ipc.open_file(pyarrow.memory_map(str(unpacked))).read_all()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, row: int) -> Row:
        (values,) = self._table.slice(row, 1).to_pylist()
        return {name: value for name, value in values.items() if value is not None}

    def where(self, row: int) -> str:
        return f"row {row + 1}"


class SavedDataset:
    """The rows of a folder that `Dataset.save_to_disk` wrote. Of several splits, `train` is read."""

    def __init__(self, path: Path):
        """Map the folder. Raises InputRefused where it is damaged, and EnvironmentLacking without `datasets`."""
        datasets = optional_package("datasets", "a saved data set needs", "data")
        self.path = path
        try:
            loaded = datasets.load_from_disk(str(path))
        except Exception as error:  # damaged folders raise a dozen types
            raise InputRefused(f"{path} is no folder that `datasets` can load: {error}") from error
        if isinstance(loaded, datasets.DatasetDict):
            if TRAINING_SPLIT not in loaded:
                raise InputRefused(
                    f"{path} has no split `{TRAINING_SPLIT}`; give one of {', '.join(loaded)} as a folder"
                )
            loaded = loaded[TRAINING_SPLIT]
        for name, feature in loaded.features.items():
            if isinstance(feature, datasets.Audio):  # its bytes: `datasets` would need one more package to decode them
                loaded = loaded.cast_column(name, datasets.Audio(decode=False))
        self._dataset = loaded
        self._names = {
            name: feature for name, feature in loaded.features.items() if isinstance(feature, datasets.ClassLabel)
        }
        hashes = (f"{file.relative_to(path)} {file_sha256(file)}\n" for file in regular_files(path))
        self.sha256 = hashlib.sha256("".join(hashes).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, row: int) -> Row:
        values: dict[str, Any] = {name: value for name, value in self._dataset[row].items() if value is not None}
        for name, feature in self._names.items():
            if name in values:
                values[name] = feature.int2str(values[name])
        return values

    def where(self, row: int) -> str:
        return f"row {row + 1}"
