"""What a program of ExecuTorch (.pte) takes: its methods and their inputs, read from the file's FlatBuffer.

Nothing is run, and ExecuTorch is not needed. The field numbers are those of ExecuTorch's schema/program.fbs ("ET12").
A file is not trusted: each offset has to lie in it, and lists are bounded.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export.errors import InputRefused, brief, refuse_unprintable
from lora_export.storage import input_files

IDENTIFIER = b"ET12"
MOST_IN_LIST = 4096  # methods, inputs, outputs, delegates, sizes: of each list
MOST_TENSORS = 1 << 16  # in all methods
MOST_READ = 1 << 20  # entries of lists that are read, as lists may share their bytes
MOST_DIMENSIONS = 64  # of a tensor
MOST_NAME = 1 << 10  # bytes
# The schema's number of a dtype -> NumPy's name
_NUMBERED = "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"
SCALAR_TYPES: Mapping[int, str] = {**dict(enumerate(_NUMBERED)), 11: "bool", 15: "bfloat16"}
# Fields of the schema's tables, by their places
_PLANS = 1  # of Program
_NAME, _VALUES, _INPUTS, _OUTPUTS, _DELEGATES, _PLANNED = 0, 2, 3, 4, 7, 8  # of ExecutionPlan
_KIND, _VALUE, _TENSOR = 0, 1, 5  # of EValue, and the kind that is a tensor
_SCALAR_TYPE, _SIZES, _DYNAMISM = 0, 2, 8  # of Tensor
_UNBOUND = 2  # of the dynamism of a shape; 0 is none, 1 has a bound


@dataclass(frozen=True)
class PlannedTensor:
    """An input or output of a method."""

    dtype: str  # NumPy's name; empty for a value that is no tensor
    sizes: tuple[int, ...] | None  # None where they have no bound
    varies: bool = False  # the sizes are then the greatest


@dataclass(frozen=True)
class ProgramMethod:
    """A method of a program, such as `forward`."""

    name: str
    inputs: tuple[PlannedTensor, ...]
    outputs: tuple[PlannedTensor, ...]
    backends: tuple[str, ...]  # what computes it, beside ExecuTorch's own kernels
    planned_bytes: int  # of memory that a run takes, without that of the backends

    def __repr__(self) -> str:
        return brief(self, self.name, f"inputs={len(self.inputs)}", f"outputs={len(self.outputs)}")


def read_methods(path: Path) -> tuple[ProgramMethod, ...]:
    """The methods of a .pte file. Raises InputRefused for another or a damaged file."""
    with input_files.open_regular(path) as file:
        file.seek(len(IDENTIFIER))
        if file.read(len(IDENTIFIER)) != IDENTIFIER:
            raise InputRefused(f"{path} is no .pte file that ExecuTorch wrote")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            buffer = _Buffer(content)
            try:
                plans = list(buffer.tables(buffer.root, _PLANS))
                methods = tuple(_method(buffer, plan) for plan in plans)
            except (struct.error, ValueError) as error:
                fault = "an offset leads out of it" if isinstance(error, struct.error) else error
                raise InputRefused(f"{path} is a damaged .pte file: {fault}") from error
    refuse_unprintable((name for method in methods for name in (method.name, *method.backends)), str(path))
    return methods


class _Buffer:
    """Tables of a FlatBuffer, each named by its place. Raises ValueError or struct.error for what is outside."""

    def __init__(self, content: mmap.mmap):
        self._content = content
        self._tensors = self._read = 0
        self.root = self._target(0)

    def _number(self, kind: str, place: int) -> int:
        if place < 0:
            raise ValueError("an offset leads out of it")
        value: int = struct.unpack_from(f"<{kind}", self._content, place)[0]
        return value

    def _target(self, place: int) -> int:
        return place + self._number("I", place)

    def _field(self, table: int, number: int) -> int:
        """The place of a field; 0 where the table lacks it."""
        fields = table - self._number("i", table)
        at = 4 + 2 * number
        offset = self._number("H", fields + at) if at < self._number("H", fields) else 0
        return table + offset if offset else 0

    def integer(self, table: int, number: int, kind: str) -> int:
        """A field of this kind, as `struct` names it. 0 where the table lacks it, which is the schema's default."""
        place = self._field(table, number)
        return self._number(kind, place) if place else 0

    def table(self, table: int, number: int) -> int:
        """The place of a table that has to be there."""
        if not (place := self._field(table, number)):
            raise ValueError("a table is missing")
        return self._target(place)

    def text(self, table: int, number: int) -> str:
        start, length = self._read_list(table, number, most=MOST_NAME)
        return self._content[start : start + length].decode(errors="replace")

    def integers(self, table: int, number: int, kind: str, most: int = MOST_IN_LIST) -> tuple[int, ...]:
        start, length = self._read_list(table, number, most)
        found: tuple[Any, ...] = struct.unpack_from(f"<{length}{kind}", self._content, start)
        return found

    def tables(self, table: int, number: int) -> Iterator[int]:
        start, length = self._read_list(table, number)
        yield from (self._target(start + 4 * index) for index in range(length))

    def entry(self, table: int, number: int, index: int) -> int:
        """The place of one table of a list, which may be long."""
        start, length = self._list(table, number, most=len(self._content))
        if not 0 <= index < length:
            raise ValueError("an index leads out of a list")
        return self._target(start + 4 * index)

    def count_tensor(self) -> None:
        self._tensors += 1
        if self._tensors > MOST_TENSORS:
            raise ValueError(f"it has more than {MOST_TENSORS:,} inputs and outputs")

    def _list(self, table: int, number: int, most: int) -> tuple[int, int]:
        """Where the entries of a list begin, and their number."""
        if not (place := self._field(table, number)):
            return 0, 0
        start = self._target(place)
        length = self._number("I", start)
        if length > most:
            raise ValueError(f"a list has {length:,} entries")
        return start + 4, length

    def _read_list(self, table: int, number: int, most: int = MOST_IN_LIST) -> tuple[int, int]:
        """The same for a list that is read as a whole."""
        start, length = self._list(table, number, most)
        self._read += length
        if self._read > MOST_READ:
            raise ValueError(f"its lists have more than {MOST_READ:,} entries")
        return start, length


def _method(buffer: _Buffer, plan: int) -> ProgramMethod:
    inputs, outputs = (
        tuple(_tensor(buffer, buffer.entry(plan, _VALUES, index)) for index in buffer.integers(plan, which, "i"))
        for which in (_INPUTS, _OUTPUTS)
    )
    backends = dict.fromkeys(buffer.text(delegate, _NAME) for delegate in buffer.tables(plan, _DELEGATES))
    planned = sum(buffer.integers(plan, _PLANNED, "q"))
    return ProgramMethod(buffer.text(plan, _NAME), inputs, outputs, tuple(backends), planned)


def _tensor(buffer: _Buffer, value: int) -> PlannedTensor:
    buffer.count_tensor()
    if buffer.integer(value, _KIND, "B") != _TENSOR:
        return PlannedTensor("", None)
    tensor = buffer.table(value, _VALUE)
    number, dynamism = buffer.integer(tensor, _SCALAR_TYPE, "b"), buffer.integer(tensor, _DYNAMISM, "b")
    sizes = None if dynamism == _UNBOUND else buffer.integers(tensor, _SIZES, "i", MOST_DIMENSIONS)
    return PlannedTensor(SCALAR_TYPES.get(number, f"type {number}"), sizes, dynamism != 0)
