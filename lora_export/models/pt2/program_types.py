"""What a program of torch.export consists of, and checks of the fields of its JSON. Nothing here imports PyTorch."""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lora_export.artifacts import archive
from lora_export.errors import InputRefused

# torch's own numbers for dtypes and memory formats (torch/_export/serde/schema.py), and its operators, of a closed list
PROGRAMS: Mapping[str, Any] = json.loads(Path(__file__).parents[1].joinpath("programs.json").read_text("utf-8"))
DTYPES_BY_NUMBER: dict[int, str] = {int(number): name for number, name in PROGRAMS["dtypes"].items()}
ITEM_BYTES = {name: 1 if name == "bool" else int(re.sub(r"\D", "", name)) // 8 for name in DTYPES_BY_NUMBER.values()}


class Symbol(NamedTuple):
    """A size that may vary."""

    name: str  # equal for equal sizes; empty where the size is an expression of others
    hint: int | None  # the size when the program was exported


class Value(NamedTuple):
    """A reference to an input of the graph or to an output of an earlier node."""

    name: str


class TorchName(NamedTuple):
    """A constant of torch: a `dtype`, a `memory_format`, a `layout` or a `device`."""

    kind: str
    name: str


class Argument(NamedTuple):
    """One argument of a node, by the operator's name for it. Higher-order operators have no names."""

    name: str
    value: Any  # Value, TorchName, Graph, a number, a string, None, or a list of these


@dataclass(frozen=True)
class Node:
    target: str  # the operator, as the file spells it
    number: int  # position in the graph
    name: str  # for messages: two nodes may have the same
    inputs: tuple[Argument, ...]
    outputs: tuple[Any, ...]  # for each result a name, a list of names, or None where it has no name


@dataclass(frozen=True)
class Graph:
    """Nodes in the order in which they run. Each reads only graph inputs and outputs of nodes before it."""

    inputs: tuple[str | None, ...]  # None for a constant that no node reads
    nodes: tuple[Node, ...]
    outputs: tuple[Any, ...]  # like the values of arguments
    is_single: bool  # its one tensor is returned by itself, not in a list


@dataclass(frozen=True)
class TensorType:
    """The dtype and sizes of a tensor."""

    dtype: str
    sizes: tuple[int | Symbol, ...]


class StoredArray(NamedTuple):
    """The data of a tensor: a view of a member's bytes."""

    member: str
    dtype: str
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # in elements, not bytes
    offset: int  # in elements


@dataclass(frozen=True)
class ProgramTensor:
    """A parameter, buffer or constant of the program."""

    value: str  # its name in the graph
    name: str  # its name in the module
    kind: str  # `parameter`, `buffer` or `constant`
    data: StoredArray
    persistent: bool = True


@dataclass(frozen=True, eq=False)
class ProgramDescription:
    """A program as its file describes it, checked."""

    path: Path
    graph: Graph
    inputs: Mapping[str, TensorType]  # by the names of forward's parameters, in their order
    input_values: Mapping[str, str]  # the graph's names of the inputs
    tensors: tuple[ProgramTensor, ...]
    outputs: Any  # the returned structure: a tuple, list or dict of positions in graph.outputs, or one position
    ranges: Mapping[str, tuple[int, int | None]]  # symbol -> least and greatest size
    graph_sha256: str  # of the graph's JSON
    members: Mapping[str, zipfile.ZipInfo] = field(repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> ProgramDescription:
        return self  # immutable, and a module is copied often

    def read_members(self) -> dict[str, bytearray]:
        """The bytes of each member that holds a tensor, their checksums verified."""
        names = dict.fromkeys(tensor.data.member for tensor in self.tensors)
        with archive.opened(self.path) as file:
            return {name: archive.content(file, self.members[name], self.path) for name in names}


SYMBOL = re.compile(r"Symbol\('(\w{1,64})'(?:, \w{1,32}=(?:True|False))*\)|(?!\d)(\w{1,64})")
NOT_FINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}  # as torch writes them
STRIDED = 7  # torch's number for dense tensors


def _of_type(kind: type[Any], what: str) -> Callable[[Any, str], Any]:
    """A check that returns a value of this type, and raises InputRefused for others; a bool is no number."""

    def expect(value: Any, where: str) -> Any:
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputRefused(f"{where}: expected {what}, found {str(value)[:80]!r}")
        return value

    return expect


json_object: Callable[[Any, str], dict[str, Any]] = _of_type(dict, "a JSON object")
json_list: Callable[[Any, str], list[Any]] = _of_type(list, "a list")
string: Callable[[Any, str], str] = _of_type(str, "a string")
boolean: Callable[[Any, str], bool] = _of_type(bool, "true or false")
_any_integer: Callable[[Any, str], int] = _of_type(int, "an integer")
_number: Callable[[Any, str], float] = _of_type((int, float), "a number")  # type: ignore[arg-type]


def integer(value: Any, where: str) -> int:
    number = _any_integer(value, where)
    if not -(1 << 63) <= number < 1 << 63:
        raise InputRefused(f"{where}: an integer of {number.bit_length()} bits is too large")
    return number


def real(value: Any, where: str) -> float:
    if isinstance(value, str) and value in NOT_FINITE:
        return NOT_FINITE[value]
    try:
        return float(_number(value, where))
    except OverflowError:
        raise InputRefused(f"{where}: a number is too large") from None


def single_field(union: Any, where: str) -> tuple[str, Any]:
    """The name and the value of a union's one field."""
    fields = json_object(union, where)
    if len(fields) != 1:
        raise InputRefused(f"{where}: expected one field, found {', '.join(fields) or 'none'}")
    ((name, value),) = fields.items()
    return name, value


def size_of(union: Any, where: str) -> int | Symbol:
    """A size: a number, or the symbol of one that varies. An expression has no name, and is not evaluated."""
    kind, value = single_field(union, where)
    if kind == "as_int":
        if integer(value, where) < 0:
            raise InputRefused(f"{where}: a size is negative")
        return int(value)
    if kind != "as_expr":
        raise InputRefused(f"{where}: a size is of the kind {kind}, which is not supported")
    expression = json_object(value, where)
    match = SYMBOL.fullmatch(string(expression.get("expr_str"), where))
    hint = expression.get("hint")
    number = None if hint is None else integer(json_object(hint, where).get("as_int"), where)
    return Symbol((match[1] or match[2]) if match else "", number)


def tensor_type_of(meta: dict[str, Any], where: str) -> TensorType:
    if meta.get("layout") != STRIDED:
        raise InputRefused(f"{where} is no dense tensor; only dense tensors are supported")
    sizes = tuple(size_of(size, where) for size in json_list(meta.get("sizes"), where))
    return TensorType(dtype_of(meta.get("dtype"), where), sizes)


def dtype_of(number: Any, where: str) -> str:
    if integer(number, where) not in DTYPES_BY_NUMBER:
        raise InputRefused(f"{where} has torch's dtype {number}, which is not supported ({', '.join(ITEM_BYTES)} are)")
    return DTYPES_BY_NUMBER[number]
