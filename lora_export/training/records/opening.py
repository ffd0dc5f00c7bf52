"""Open a data set by its path: a file of rows, or a folder.

In a folder, each text file is a row, or each image, whose class is the name of its folder; or sounds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused, count, count_that_are, listed
from lora_export.isolation.limits import MAX_ROW
from lora_export.storage.hashes import file_sha256
from lora_export.storage.input_files import must_exist, open_regular, shown_files
from lora_export.storage.npz import read_arrays
from lora_export.training.records.rows import (
    DATASET_FILES,
    CsvRows,
    JsonLines,
    ParquetRows,
    Records,
    Row,
    SavedDataset,
    same_label,
    with_columns,
)

SOUND_METADATA: Mapping[str, type[CsvRows | JsonLines]] = {"metadata.csv": CsvRows, "metadata.jsonl": JsonLines}
ROW_READERS: Mapping[str, Callable[[Path], Records]] = {".jsonl": JsonLines, ".csv": CsvRows, ".parquet": ParquetRows}
FILE_KINDS = {  # of files in a folder; all others are texts
    **dict.fromkeys((".aac", ".flac", ".m4a", ".mp3", ".oga", ".ogg", ".opus", ".wav"), "sound"),
    **dict.fromkeys((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"), "image"),
    **dict.fromkeys(ROW_READERS, "table"),
}
SPLITS = {"dev", "eval", "test", "train", "training", "val", "valid", "validation"}  # folders of classes, in image data
DATA_FORMATS = (
    ".jsonl, .csv and .parquet (with columns such as `text` and `label`), .npz (with the model's inputs and `labels`), "
    "a folder of text files, of images by class, of sounds with metadata.csv, or of a saved `datasets` data set, and "
    "`file.py:factory`"
)


class _Files(Records):
    """Files below a folder, in the order of their paths: each is a row."""

    def __init__(self, path: Path, files: Sequence[Path]):
        self.path, self.files = path, files
        lines = (f"{file.relative_to(path).as_posix()} {file_sha256(file)}\n" for file in files)
        self.sha256 = hashlib.sha256("".join(lines).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def where(self, row: int) -> str:
        return str(self.files[row].relative_to(self.path))


class TextFiles(_Files):
    """Text files. A row has the whole text in `text`."""

    def read(self, row: int) -> Row:
        with open_regular(self.files[row]) as file:
            content = file.read(MAX_ROW + 1)
        if len(content) > MAX_ROW:
            raise InputRefused(f"{self.files[row]} has more than {MAX_ROW:,} bytes")
        try:
            return {"text": content.decode("utf-8-sig")}
        except UnicodeDecodeError as error:
            raise InputRefused(f"{self.files[row]} is not UTF-8: byte {error.start}") from error


class ImagesByClass(_Files):
    """The images in the folders of a folder. A row has the path of one in `image`, and its folder's name in `label`."""

    def read(self, row: int) -> Row:
        return {"image": self.files[row], "label": self.files[row].relative_to(self.path).parts[0]}


class DescribedSounds(Records):
    """The sounds of a folder, which its metadata.csv or .jsonl names. A row has the path of one in `audio`.

    As in `datasets`, the path is in `file_name`. The transcript is in `transcription`, `text`, or a column of the user.
    """

    def __init__(self, path: Path):
        """Raises InputRefused without the metadata."""
        found = [name for name in SOUND_METADATA if (path / name).is_file()]
        if not found:
            raise InputRefused(
                f"{path} has sounds, and no {' or '.join(SOUND_METADATA)} with the columns file_name and transcription"
            )
        self.path, self.metadata = path, found[0]
        self.rows = SOUND_METADATA[self.metadata](path / self.metadata)
        self.sha256 = self.rows.sha256

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, row: int) -> Row:
        values = self.rows[row]
        names = {"file_name": "audio"} | ({} if "text" in values else {"transcription": "text"})
        return {names.get(name, name): value for name, value in values.items()}

    def where(self, row: int) -> str:
        return f"{self.metadata}, {self.rows.where(row)}"


def open_folder(path: Path) -> Records:
    """The images of a folder by class, its sounds with their metadata, or its text files. Hidden files are left out.

    Raises InputRefused for images beside other files, in no folder of a class or in those of splits, for sounds without
    metadata, for files of rows among texts (each would be one long text), and for an empty folder.
    """
    if any((path / name).is_file() for name in DATASET_FILES):
        return SavedDataset(path)
    files = shown_files(path)
    kinds = {file: FILE_KINDS.get(file.suffix.lower(), "text") for file in files}
    if not kinds:
        raise InputRefused(f"{path} contains no files")
    if "sound" in kinds.values():
        return DescribedSounds(path)
    images = [file for file, kind in kinds.items() if kind == "image"]
    others = [str(file.relative_to(path)) for file, kind in kinds.items() if kind != "image"]
    if images and others:
        raise InputRefused(f"{path} has {len(images):,} images, and other files:", listed(sorted(others)))
    if loose := [str(file.relative_to(path)) for file in images if file.parent == path]:
        raise InputRefused(f"{path} has images that are in no folder of a class:", listed(loose))
    names = {file.relative_to(path).parts[0] for file in images}
    if images and names <= SPLITS:
        raise InputRefused(f"{path} has splits, and no classes: give one of {', '.join(sorted(names))} as the folder")
    if tables := [str(file) for file, kind in kinds.items() if kind == "table"]:
        raise InputRefused(f"{path} contains files of rows. Name one of them as the data:", listed(tables))
    return ImagesByClass(path, images) if images else TextFiles(path, list(kinds))


def open_records(path: Path, columns: Mapping[str, str] | None = None) -> Records:
    """Open a file or folder of rows. `columns` renames: the name that the program reads -> the name in the data.

    Raises InputRefused where it cannot be read, has no rows or lacks a column, and EnvironmentLacking where a package
    is missing.
    """
    must_exist(path, "data")
    if path.is_dir():
        records = open_folder(path)
    elif (reader := ROW_READERS.get(path.suffix.lower())) is None:
        raise InputRefused(f"{path}: data are read from {DATA_FORMATS}")
    else:
        records = reader(path)
    if not len(records):
        raise InputRefused(f"{path} contains no examples")
    return with_columns(records, columns or {})


# --- Labelled arrays from an .npz file, one row per example for each of the model's inputs. NumPy only ---

IGNORED = -100  # the label that cross-entropy ignores


@dataclass(frozen=True, eq=False)
class LabelledArrays:
    """Arrays with one row per example."""

    inputs: Mapping[str, NDArray[Any]]  # parameter of forward -> (n, ...)
    labels: NDArray[Any]  # (n, ...): int64 indices of classes, or float32 values to predict

    def __len__(self) -> int:
        return len(self.labels)

    def __str__(self) -> str:
        if self.labels.dtype.kind == "f":
            return count(len(self), "example")
        return f"{count(len(self), 'example')} of {count(int(self.labels.max(initial=-1)) + 1, 'class', 'classes')}"


def read_labelled_arrays(path: Path) -> LabelledArrays:
    """Read an .npz file with arrays named like forward's parameters, and `labels`.

    Integer labels are classes, float labels are values to predict. Raises InputRefused with the arrays that are wrong.
    """
    arrays = read_arrays(path)
    if "labels" not in arrays:
        raise InputRefused(f"{path} has no `labels` beside {', '.join(arrays) or 'nothing'}")
    labels = arrays.pop("labels")
    inputs, labels = {name: _in_fp32(values) for name, values in arrays.items()}, _in_fp32(labels)
    if problems := _array_problems(inputs, labels):
        raise InputRefused(f"{path}:", listed(problems))
    if not len(labels):
        raise InputRefused(f"{path} contains no examples")
    return LabelledArrays(inputs, labels if labels.dtype.kind == "f" else labels.astype(np.int64))


def _in_fp32(values: NDArray[Any]) -> NDArray[Any]:
    """Floats as a module is trained with them: NumPy's default is fp64. What is beyond fp32 becomes infinite."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32) if values.dtype.kind == "f" else values


def _array_problems(arrays: Mapping[str, NDArray[Any]], labels: NDArray[Any]) -> list[str]:
    number = len(labels) if labels.ndim else 0
    problems = [] if arrays else ["it contains labels alone"]
    for name, values in {**arrays, "labels": labels}.items():
        if values.shape[:1] != (number,):
            problems.append(f"`{name}` has the shape {values.shape}, and there are {number} labels")
        elif values.dtype.kind == "f" and not np.isfinite(values).all():
            bad = np.argwhere(~np.isfinite(values))
            what = f"`{name}` contains {count_that_are(len(bad), 'value')} not finite"
            problems.append(f"{what}, the first in row {bad[0][0]}")
        elif values.dtype.kind not in "fiub":
            problems.append(f"`{name}` contains {values.dtype}, not numbers")
    negative = labels[(labels < 0) & (labels != IGNORED)] if labels.dtype.kind == "i" else labels[:0]
    if negative.size:
        problems.append(f"`labels` contain {negative[0]}; classes are counted from 0 ({IGNORED} is ignored)")
    counted = labels[labels != IGNORED]
    if not problems and labels.dtype.kind in "iub" and number and len(np.unique(counted)) < 2:
        problems.append(same_label(number))
    return problems
