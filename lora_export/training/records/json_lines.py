"""Rows of a .jsonl file: one JSON object on each line. The file may be larger than memory."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lora_export.errors import InputRefused
from lora_export.storage.input_files import open_regular
from lora_export.training.records.rows import MAX_ROW, Row


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
