"""Rows of a .jsonl file, one JSON object a line, and of a .csv file with a header. Both may be larger than memory."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lora_export.errors import InputRefused, listed
from lora_export.storage.input_files import open_regular
from lora_export.training.records.rows import MAX_ROW, Row

BOM = b"\xef\xbb\xbf"


class JsonLines:
    """The objects of a .jsonl file. Memory holds 16 bytes for each line that is not empty."""

    def __init__(self, path: Path):
        """Read the file once, for the places of its lines. Raises InputRefused where it cannot be read."""
        self.path = path
        self.offsets, self.numbers = array("q"), array("q")
        digest = hashlib.sha256()
        with open_regular(path) as file:
            for number, offset, line in numbered_lines(file, path):
                digest.update(line)
                if line.strip():
                    self.offsets.append(offset)
                    self.numbers.append(number)
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, row: int) -> Row:
        with open_regular(self.path) as file:
            file.seek(self.offsets[row])
            line = file.readline(MAX_ROW)
        try:
            values: Any = json.loads(line)
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

    def where(self, row: int) -> str:
        return f"line {self.numbers[row]}"


def numbered_lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Line number from 1, offset in bytes, and the line. Raises InputRefused for a line longer than MAX_ROW."""
    offset, number = 0, 0
    while line := file.readline(MAX_ROW + 1):
        number += 1
        if len(line) > MAX_ROW:
            raise InputRefused(f"{path}, line {number} has more than {MAX_ROW:,} bytes")
        yield number, offset, line
        offset += len(line)


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
