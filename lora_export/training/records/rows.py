"""What every reader of rows offers, and the names of their columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lora_export.errors import InputRefused

Row = Mapping[str, Any]  # column -> value
MAX_ROW = 1 << 26  # bytes of one line; a longer one is no text that anybody trains on


class Records(Protocol):
    """The rows of a data set. They stay on the disk: memory grows by a few bytes for each row."""

    @property
    def path(self) -> Path: ...

    @property
    def sha256(self) -> str:
        """The hash of all data, in hexadecimal."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Row:
        """Read one row. Raises InputRefused, with the place, where it cannot be read."""
        ...

    def where(self, row: int) -> str:
        """Where a row is in its file: `line 7`."""
        ...


@dataclass(frozen=True)
class RenamedColumns:
    """The same rows, with other names for some columns. A renamed column hides another one of its new name."""

    records: Records
    names: Mapping[str, str]  # name here -> name in the data

    @property
    def path(self) -> Path:
        return self.records.path

    @property
    def sha256(self) -> str:
        return self.records.sha256

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> Row:
        values = self.records[row]
        renamed = {name: values[source] for name, source in self.names.items() if source in values}
        sources = set(self.names.values())
        return {**{name: value for name, value in values.items() if name not in sources}, **renamed}

    def where(self, row: int) -> str:
        return self.records.where(row)


def with_columns(records: Records, names: Mapping[str, str]) -> Records:
    """The rows with columns renamed, `name here -> name in the data`. Raises InputRefused for a name that is missing.

    Only the first row is looked at.
    """
    if not names:
        return records
    known = list(records[0])
    if unknown := [source for source in names.values() if source not in known]:
        raise InputRefused(f"{records.path} has no column {', '.join(unknown)}; it has {', '.join(known)}")
    return RenamedColumns(records, dict(names))
