"""What every reader of rows offers, the names of their columns, and the sounds that rows name."""

from __future__ import annotations

import contextlib
import copy
import csv
import hashlib
import io
import json
import tempfile
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from lora_export.errors import SHOWN_PROBLEMS, InputRefused, listed
from lora_export.extras import optional_package
from lora_export.isolation.bounds import bounded_memory
from lora_export.isolation.limits import MAX_INFLATED, MAX_RATIO, MAX_ROW, memory_for
from lora_export.models.processors import sound_header
from lora_export.storage.hashes import file_sha256
from lora_export.storage.input_files import file_states, must_be_regular, open_regular, regular_files
from lora_export.storage.json_files import checked_objects, refuse_flood

Row = Mapping[str, Any]  # column -> value


class Records(ABC):
    """The rows of a data set. They stay on the disk: memory grows by a few bytes for each row."""

    path: Path
    sha256: str  # of all data, in hexadecimal
    has_types = True  # otherwise every value is a text
    names: Mapping[str, str] = MappingProxyType({})  # name of a column here -> its name in the data, where it differs

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, row: int) -> Row:
        """Read one row. Raises InputRefused, with the place, where it cannot be read."""

    def where(self, row: int) -> str:
        """Where a row is in its file: `line 7`."""
        return f"row {row + 1}"

    @contextlib.contextmanager
    def naming(self, row: int) -> Iterator[None]:
        """Put the place of a row before the text of a refusal."""
        try:
            yield
        except InputRefused as error:
            raise InputRefused(f"{self.path}, {self.where(row)}: {error}") from error

    def __getitem__(self, row: int) -> Row:
        """One row, as it was read. A renamed column hides another one of its new name."""
        values, sources = self.read(row), set(self.names.values())
        renamed = {name: values[source] for name, source in self.names.items() if source in values}
        return {**{name: value for name, value in values.items() if name not in sources}, **renamed}


def with_columns(records: Records, names: Mapping[str, str]) -> Records:
    """The rows with columns renamed, `name here -> name in the data`. Raises InputRefused for a name that is missing.

    Only the first row is looked at.
    """
    if not names:
        return records
    known = list(records[0])
    if unknown := [source for source in names.values() if source not in known]:
        raise InputRefused(f"{records.path} has no column {', '.join(unknown)}; it has {', '.join(known)}")
    renamed = copy.copy(records)
    renamed.names = dict(names)
    return renamed


# --- Sounds and images ---

AUDIO, IMAGE = "audio", "image"  # the columns


def file_in(records: Records, value: Any, column: str = AUDIO) -> Any:
    """The file or the bytes of a sound or image: a path relative to the data, or a `datasets` row's `bytes` or `path`.

    A Path, and an image of Pillow, is returned as it is. Raises InputRefused for a value of another kind.
    """
    if isinstance(value, Path) or (column == IMAGE and hasattr(value, "convert")):
        return value
    if isinstance(value, Mapping):
        if isinstance(content := value.get("bytes"), bytes):
            return content
        value = value.get("path")
    if not isinstance(value, str) or not value.strip():
        what = "an image" if column == IMAGE else "a sound"
        raise InputRefused(f"`{column}` is {value!r:.80}; it must be the path of {what}")
    home = records.path if records.path.is_dir() else records.path.parent
    return home / value


def same_label(number: int) -> str:
    """What is wrong with examples of one class."""
    if number == 1:
        return "there is only one example; there is nothing to learn"
    return f"all {number} examples have the same label; there is nothing to learn"


def file_problem(records: Records, value: Any, column: str = AUDIO) -> str:
    """What is wrong with the file of a row, from the header of a sound alone; empty where nothing is."""
    try:
        found = file_in(records, value, column)
        if isinstance(found, Path) and not found.is_file():
            return f"there is no file {found}"
        return "" if column == IMAGE or sound_header(found).samples else "the sound has no samples"
    except InputRefused as error:
        return str(error)


def sha256_with_files(records: Records, column: str = AUDIO) -> str:
    """The hash of the rows and of all files that they name."""
    digest = hashlib.sha256(records.sha256.encode())
    for row in range(len(records)):
        found = file_in(records, records[row][column], column)
        if isinstance(found, Path):
            digest.update(file_sha256(found).encode())
    return digest.hexdigest()


# --- Rows of .jsonl, .csv and .parquet files, and of a folder that `datasets` saved. All may be larger than memory ---

BOM = b"\xef\xbb\xbf"


class _OfLines(Records):
    """Rows by the places and the numbers of their lines."""

    offsets: array[int]
    numbers: array[int]
    state: tuple[int, ...]  # of the file when its lines were found

    def opened(self) -> BinaryIO:
        """The file, which must be as it was. Raises InputRefused otherwise."""
        file = open_regular(self.path)
        if _content_state(self.path) != self.state:
            file.close()
            raise InputRefused(f"{self.path} changed while it was read. Begin again")
        return file

    def __len__(self) -> int:
        return len(self.offsets)

    def where(self, row: int) -> str:
        return f"line {self.numbers[row]}"


def _content_state(path: Path) -> tuple[int, ...]:
    """Device, inode, size and the time of the last write: not when its mode or its links changed."""
    return file_states([path])[0][:4]


class JsonLines(_OfLines):
    """The objects of a .jsonl file. Memory holds 16 bytes for each line that is not empty."""

    def __init__(self, path: Path):
        """Read the file once, for the places of its lines. Raises InputRefused where it cannot be read."""
        must_be_regular(path)
        self.path, self.state = path, _content_state(path)
        self.offsets, self.numbers = array("q"), array("q")
        digest = hashlib.sha256()
        with open_regular(path) as file:
            for number, offset, line in numbered_lines(file, path):
                digest.update(line)
                if line.strip():
                    self.offsets.append(offset)
                    self.numbers.append(number)
        self.sha256 = digest.hexdigest()

    def read(self, row: int) -> Row:
        with self.opened() as file:
            file.seek(self.offsets[row])
            line = file.readline(MAX_ROW)
        refuse_flood(line, f"{self.path}, {self.where(row)}")
        try:
            values: Any = json.loads(line, object_pairs_hook=checked_objects(f"{self.path}, {self.where(row)}"))
        except json.JSONDecodeError as error:
            column = min(error.pos, len(error.doc.rstrip())) + 1  # its own line and column count from this line
            raise InputRefused(f"{self.path}, {self.where(row)}: not JSON ({error.msg}: column {column})") from error
        except UnicodeDecodeError as error:
            raise InputRefused(f"{self.path}, {self.where(row)}: not UTF-8: byte {error.start + 1}") from error
        except (ValueError, RecursionError) as error:
            raise InputRefused(f"{self.path}, {self.where(row)}: not JSON ({error})") from error
        if not isinstance(values, dict):
            raise InputRefused(f"{self.path}, {self.where(row)}: not an object with columns by name")
        return values


def numbered_lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Line number from 1, offset in bytes, and the line. Raises InputRefused for a line longer than MAX_ROW."""
    offset, number = 0, 0
    while line := file.readline(MAX_ROW + 1):
        number += 1
        if len(line) > MAX_ROW:
            raise InputRefused(f"{path}, line {number} has more than {MAX_ROW:,} bytes")
        yield number, offset, line
        offset += len(line)


class CsvRows(_OfLines):
    """The rows of a .csv file; every value is a string. Memory holds 24 bytes for each row."""

    has_types = False

    def __init__(self, path: Path):
        """Read the file once. Raises InputRefused, with the lines, for what is no CSV in UTF-8 with a header."""
        must_be_regular(path)
        self.path, self.state = path, _content_state(path)
        self.offsets, self.ends, self.numbers = array("q"), array("q"), array("q")
        self.columns: tuple[str, ...] = ()
        digest = hashlib.sha256()
        problems: list[str] = []
        csv.field_size_limit(MAX_ROW)
        with open_regular(path) as file:
            source = _Lines(file, path, digest)
            reader = csv.reader(source, strict=True)
            try:
                self.columns = tuple(next(reader, []))
                self._refuse_header()
                begin = source.end
                for row in reader:
                    if row and len(row) != len(self.columns):
                        found = f"{len(row)} fields, the header has {len(self.columns)}"
                        problems.append(f"line {reader.line_num}: {found}")
                    elif row:
                        self.offsets.append(begin)
                        self.ends.append(source.end)
                        self.numbers.append(reader.line_num)
                    begin = source.end
            except csv.Error as error:
                problems.append(f"line {reader.line_num}: {error}")
        if problems:
            raise InputRefused(f"{path}:", listed(problems))
        self.sha256 = digest.hexdigest()

    def _refuse_header(self) -> None:
        if not self.columns:
            raise InputRefused(f"{self.path} has no header: its first line must name the columns")
        repeated = sorted(name for name, count in Counter(self.columns).items() if count > 1)
        if repeated or not any(self.columns):
            names = ", ".join(repeated[:SHOWN_PROBLEMS] or self.columns) or "nothing"
            raise InputRefused(f"{self.path}: the first line must name each column once, not {names}")

    def read(self, row: int) -> Row:
        with self.opened() as file:
            file.seek(self.offsets[row])
            text = file.read(self.ends[row] - self.offsets[row]).decode()
        values = next(csv.reader(io.StringIO(text, newline=""), strict=True))
        return dict(zip(self.columns, values, strict=True))


class _Lines:
    """Decoded lines for csv.reader, and where the last one ends. A BOM is not part of the first."""

    def __init__(self, file: BinaryIO, path: Path, digest: Any):
        self.file, self.path, self.digest = file, path, digest
        self.end = 0  # bytes

    def __iter__(self) -> Iterator[str]:
        for number, offset, line in numbered_lines(self.file, self.path):
            self.digest.update(line)
            self.end = offset + len(line)
            try:
                yield (line.removeprefix(BOM) if number == 1 else line).decode()
            except UnicodeDecodeError as error:
                raise InputRefused(f"{self.path}, line {number} is not UTF-8: byte {error.start + 1}") from error


# --- in Arrow's memory layout, mapped from the disk ---

TRAINING_SPLIT = "train"
UNPACKED_ROWS = 1024  # that are unpacked
ARROW = ("pyarrow", "pyarrow.parquet")
DATASET_FILES = ("dataset_info.json", "dataset_dict.json")  # a folder of `datasets` has one of them


def _without_filled(value: Any) -> Any:
    """A value without fields of null: a table fills in those that other messages or tools have."""
    if isinstance(value, list):
        return list(map(_without_filled, value))
    is_row = isinstance(value, dict)
    return {name: _without_filled(own) for name, own in value.items() if own is not None} if is_row else value


class ParquetRows(Records):
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
        packed, total = path.stat().st_size, 0
        try:
            with (
                bounded_memory(memory_for(packed)),
                parquet.ParquetFile(path) as file,
                pyarrow.ipc.new_file(unpacked, file.schema_arrow) as writer,
            ):
                for group in file.iter_batches(UNPACKED_ROWS):
                    total += group.nbytes
                    if total > MAX_INFLATED and total > MAX_RATIO * packed:
                        raise InputRefused(f"{path} inflates from {packed:,} bytes to more than {total:,}")
                    writer.write_batch(group)
        except (pyarrow.ArrowException, OSError, ValueError, TypeError, KeyError, RuntimeError, MemoryError) as error:
            raise InputRefused(f"{path} is no .parquet file: {str(error).strip()}") from error
        self._table = pyarrow.ipc.open_file(pyarrow.memory_map(str(unpacked))).read_all()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def read(self, row: int) -> Row:
        return {name: _without_filled(value) for name, value in self._table.slice(row, 1).to_pylist()[0].items()}


class SavedDataset(Records):
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
        kinds = {
            name: getattr(feature, "feature", feature) for name, feature in loaded.features.items()
        }  # or of a list
        self._names = {name: kind for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)}
        hashes = (f"{file.relative_to(path)} {file_sha256(file)}\n" for file in regular_files(path))
        self.sha256 = hashlib.sha256("".join(hashes).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, row: int) -> Row:
        values = {name: _without_filled(value) for name, value in self._dataset[row].items()}
        for name, kind in self._names.items():
            numbers = values[name] if isinstance(values[name], list) else [values[name]]
            if outside := [
                number for number in numbers if number is not None and number not in range(kind.num_classes)
            ]:
                what = f"`{name}` is {outside[0]}, and its classes are 0 to {kind.num_classes - 1}"
                raise InputRefused(f"{self.path}, {self.where(row)}: {what}")  # -1 where nobody gave a label
            found = [None if number is None else kind.int2str(number) for number in numbers]
            values[name] = found if isinstance(values[name], list) else found[0]
        return values
