"""Rows of a .csv file with a header. The file may be larger than memory."""

from __future__ import annotations

import csv
import hashlib
import io
from array import array
from collections.abc import Iterator
from pathlib import Path

from lora_export.errors import InputRefused, listed
from lora_export.storage.input_files import open_regular
from lora_export.training.records.json_lines import numbered_lines
from lora_export.training.records.rows import MAX_ROW, Row

BOM = b"\xef\xbb\xbf"


class CsvRows:
    """The rows of a .csv file; every value is a string. Memory holds 24 bytes for each row."""

    def __init__(self, path: Path):
        """Read the file once. Raises InputRefused, with the lines, for what is no CSV in UTF-8 with a header."""
        self.path = path
        self.offsets, self.ends, self.numbers = array("q"), array("q"), array("q")
        self.columns: tuple[str, ...] = ()
        digest = hashlib.sha256()
        problems: list[str] = []
        csv.field_size_limit(MAX_ROW)
        with open_regular(path) as file:
            source = _Lines(numbered_lines(file, path), path, digest.update)
            reader = csv.reader(source, strict=True)
            try:
                self.columns = tuple(next(reader, []))
                self._refuse_header()
                begin = source.end
                for row in reader:
                    if row and len(row) != len(self.columns):
                        problem = f"line {reader.line_num}: {len(row)} fields, the header has {len(self.columns)}"
                        problems.append(problem)
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
        repeated = sorted({name for name in self.columns if self.columns.count(name) > 1})
        if repeated or not any(self.columns):
            names = ", ".join(self.columns) or "nothing"
            raise InputRefused(f"{self.path}: the first line must name each column once, not {names}")

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, row: int) -> Row:
        with open_regular(self.path) as file:
            file.seek(self.offsets[row])
            text = file.read(self.ends[row] - self.offsets[row]).decode()
        values = next(csv.reader(io.StringIO(text, newline=""), strict=True))
        return dict(zip(self.columns, values, strict=True))

    def where(self, row: int) -> str:
        return f"line {self.numbers[row]}"


class _Lines:
    """Decoded lines for csv.reader, and where the last one ends. A BOM is not part of the first."""

    def __init__(self, lines: Iterator[tuple[int, int, bytes]], path: Path, update: object):
        self.lines, self.path, self.update = lines, path, update
        self.end = 0  # bytes

    def __iter__(self) -> Iterator[str]:
        for number, offset, line in self.lines:
            self.update(line)  # type: ignore[operator]
            self.end = offset + len(line)
            text = line.removeprefix(BOM) if number == 1 else line
            try:
                yield text.decode()
            except UnicodeDecodeError as error:
                raise InputRefused(f"{self.path}, line {number} is not UTF-8: byte {error.start + 1}") from error
