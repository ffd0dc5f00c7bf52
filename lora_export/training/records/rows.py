"""What every reader of rows offers, the names of their columns, and the sounds that rows name."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lora_export.errors import InputRefused
from lora_export.models.processors import sound_header
from lora_export.storage.hashes import file_sha256

Row = Mapping[str, Any]  # column -> value


class Records:
    """The rows of a data set. They stay on the disk: memory grows by a few bytes for each row."""

    path: Path
    sha256: str  # of all data, in hexadecimal
    has_types = True  # otherwise every value is a text
    names: Mapping[str, str] = MappingProxyType({})  # name of a column here -> its name in the data, where it differs

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, row: int) -> Row:
        """Read one row. Raises InputRefused, with the place, where it cannot be read."""
        raise NotImplementedError

    def where(self, row: int) -> str:
        """Where a row is in its file: `line 7`."""
        return f"row {row + 1}"

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


# --- Sounds ---

AUDIO = "audio"  # the column


def sound_in(records: Records, value: Any) -> Path | bytes:
    """The file or the bytes of a sound: a path relative to the data, or the `bytes` or `path` of a `datasets` row.

    Raises InputRefused for a value of another kind.
    """
    if isinstance(value, Mapping):
        if isinstance(content := value.get("bytes"), bytes):
            return content
        value = value.get("path")
    if not isinstance(value, str | Path) or not str(value).strip():
        raise InputRefused(f"`{AUDIO}` is {value!r:.80}; it must be the path of a sound")
    home = records.path if records.path.is_dir() else records.path.parent
    return home / value


def sound_problem(records: Records, value: Any) -> str:
    """What is wrong with the sound of a row, from its header alone; empty where nothing is."""
    try:
        found = sound_in(records, value)
        if isinstance(found, Path) and not found.is_file():
            return f"there is no file {found}"
        return "" if sound_header(found).samples else "the sound has no samples"
    except InputRefused as error:
        return str(error)


def sha256_with_sounds(records: Records) -> str:
    """The hash of the rows and of all files that they name."""
    digest = hashlib.sha256(records.sha256.encode())
    for row in range(len(records)):
        found = sound_in(records, records[row][AUDIO])
        if isinstance(found, Path):
            digest.update(file_sha256(found).encode())
    return digest.hexdigest()
