"""What a program of torch.export consists of, and its graph from its JSON, each value made before it is read.

Nested containers of its inputs and outputs (torch's pytrees) are read from JSON, counted and filled. Nothing here
imports PyTorch.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lora_export.artifacts import archive
from lora_export.errors import InputRefused, refuse_unprintable
from lora_export.storage import json_files

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


# The kinds of arguments that also come as lists, under the same name with an s.
LISTED = (
    *("as_tensor", "as_int", "as_float", "as_bool", "as_string"),
    *("as_sym_int", "as_sym_float", "as_sym_bool", "as_optional_tensor"),
)
# The field with the name of a value that is made, by its kind.
NAMED = {"as_tensor": "name", "as_sym_int": "as_name", "as_sym_float": "as_name", "as_sym_bool": "as_name"}
SEQUENCES = {"builtins.tuple": tuple, "builtins.list": list, "collections.deque": list}
MAPPINGS = ("builtins.dict", "collections.OrderedDict")
TRANSFORMERS = "transformers."  # its ModelOutputs are read as dicts; the type is not imported


def read_graph(raw: dict[str, Any], path: Path) -> Graph:
    """The graph of the program in the file `path`. Raises InputRefused for what is not supported."""
    return _GraphReader(path).graph(raw, f"{path}: its graph")


class _GraphReader:
    def __init__(self, path: Path):
        self.path = path

    def graph(self, raw: dict[str, Any], where: str) -> Graph:
        """A graph. A graph inside another one reads only its own inputs, not the values around it."""
        known: set[str] = set()
        inputs = tuple(self._graph_input(each, where) for each in json_list(raw.get("inputs"), where))
        for name in inputs:
            self._define(name, known, where)
        nodes = []
        for number, each in enumerate(json_list(raw.get("nodes"), where)):
            node = self._node(json_object(each, where), number, known)
            for name in _output_names(node.outputs):
                self._define(name, known, f"{self.path}: node {node.name}")
            nodes.append(node)
        outputs = tuple(self._argument(each, known, where) for each in json_list(raw.get("outputs"), where))
        return Graph(inputs, tuple(nodes), outputs, raw.get("is_single_tensor_return") is True)

    def _define(self, name: str | None, known: set[str], where: str) -> None:
        if name in known:
            raise InputRefused(f"{where}: {name} is made more than once")
        if name is not None:
            known.add(name)

    def _graph_input(self, union: Any, where: str) -> str | None:
        kind, value = single_field(union, where)
        if kind in ("as_tensor", "as_sym_int"):
            return _name(kind, value, where)
        if kind in ("as_none", "as_int", "as_float", "as_bool", "as_string"):
            return None
        raise InputRefused(f"{where} takes an input of the kind {kind!r}, which is not supported")

    def _node(self, raw: dict[str, Any], number: int, known: set[str]) -> Node:
        target = string(raw.get("target"), f"{self.path}: node {number}")
        name = raw.get("name")
        name = name if isinstance(name, str) and name.isidentifier() and len(name) < 200 else str(number)
        where = f"{self.path}: node {name} ({target[:80]})"
        inputs = []
        for each in json_list(raw.get("inputs"), where):
            fields = json_object(each, where)
            value = self._argument(fields.get("arg"), known, where)
            inputs.append(Argument(string(fields.get("name"), where), value))
        named = [each.name for each in inputs if each.name]
        if len(set(named)) != len(named):
            raise InputRefused(f"{where} has an argument more than once")
        outputs = tuple(self._result(output, where) for output in json_list(raw.get("outputs"), where))
        return Node(target, number, name, tuple(inputs), outputs)

    def _result(self, union: Any, where: str) -> Any:
        kind, value = single_field(union, where)
        if kind in NAMED:
            return _name(kind, value, where)
        if kind == "as_tensors":
            return [_name("as_tensor", each, where) for each in json_list(value, where)]
        if kind == "as_none":
            return None
        raise InputRefused(f"{where} makes a result of the kind {kind!r}, which is not supported")

    def _argument(self, union: Any, known: set[str], where: str) -> Any:
        kind, value = single_field(union, where)
        readers: dict[str, Callable[[Any], Any]] = {
            "as_none": lambda _: None,
            "as_tensor": lambda each: self._value(json_object(each, where).get("name"), known, where),
            "as_int": lambda each: integer(each, where),
            "as_float": lambda each: real(each, where),
            "as_bool": lambda each: boolean(each, where),
            "as_string": lambda each: string(each, where),
            "as_sym_int": lambda each: self._symbolic(each, known, where, integer),
            "as_sym_float": lambda each: self._symbolic(each, known, where, real),
            "as_sym_bool": lambda each: self._symbolic(each, known, where, boolean),
            "as_optional_tensor": lambda each: self._argument(each, known, where),
            "as_scalar_type": lambda each: TorchName("dtype", dtype_of(each, where)),
            "as_memory_format": lambda each: TorchName("memory_format", _memory_format(each, where)),
            "as_layout": lambda each: TorchName("layout", _layout(each, where)),
            "as_device": lambda each: TorchName("device", string(json_object(each, where).get("type"), where)),
            "as_graph": lambda each: self.graph(json_object(json_object(each, where).get("graph"), where), where),
        }
        if kind.endswith("s") and kind.removesuffix("s") in LISTED:
            return [readers[kind.removesuffix("s")](each) for each in json_list(value, where)]
        if kind not in readers:
            raise InputRefused(f"{where} has an argument of the kind {kind!r}, which is not supported")
        return readers[kind](value)

    def _value(self, name: Any, known: set[str], where: str) -> Value:
        if string(name, where) not in known:
            raise InputRefused(f"{where} reads {name!r}, which nothing before it makes")
        return Value(name)

    def _symbolic(self, union: Any, known: set[str], where: str, number: Callable[[Any, str], Any]) -> Any:
        kind, value = single_field(union, where)
        return self._value(value, known, where) if kind == "as_name" else number(value, where)


def _name(kind: str, value: Any, where: str) -> str:
    return string(json_object(value, where).get(NAMED[kind]), where)


def _memory_format(number: Any, where: str) -> str:
    if str(integer(number, where)) not in PROGRAMS["memory_formats"]:
        raise InputRefused(f"{where}: {number} is no memory format of torch")
    return str(PROGRAMS["memory_formats"][str(number)])


def _layout(number: Any, where: str) -> str:
    if number != STRIDED:
        raise InputRefused(f"{where}: only dense tensors are supported")
    return "strided"


def _output_names(outputs: Sequence[Any]) -> Iterator[str]:
    for output in outputs:
        if isinstance(output, str):
            yield output
        elif output is not None:
            yield from output


# --- structures ---


def read_structure(text: Any, where: str, positions: Iterator[int], fields: Mapping[str, Any]) -> Any:
    """The structure in a text of JSON, with the next of `positions` in place of each leaf.

    `fields` has the named tuples of the program. No type that the text names is looked up. Raises InputRefused for
    containers other than tuples, lists and dicts.
    """
    wrapped = '{"structure": ' + string(text, where) + "}"
    parsed = json_files.parse_json(wrapped.encode(errors="surrogatepass"), where)
    spec = json_list(parsed.get("structure"), where)
    if len(parsed) != 1 or len(spec) != 2 or spec[0] != 1:
        raise InputRefused(f"{where}: only structures of version 1 are supported")
    return _container(json_object(spec[1], where), where, positions, fields)


def _container(spec: dict[str, Any], where: str, positions: Iterator[int], fields: Mapping[str, Any]) -> Any:
    kind, children = spec.get("type"), json_list(spec.get("children_spec"), where)
    if kind is None:
        return next(positions, -1)
    name = string(kind, where)
    parts = [_container(json_object(child, where), where, positions, fields) for child in children]
    if name in SEQUENCES:
        return SEQUENCES[name](parts)
    keys: Any = None
    if name in MAPPINGS or name.startswith(TRANSFORMERS):
        wrapped = '{"keys": ' + string(spec.get("context"), where) + "}"
        keys = json_files.parse_json(wrapped.encode(errors="surrogatepass"), where).get("keys")
    elif name == "collections.namedtuple" or name in fields:
        return tuple(parts)
    if not isinstance(keys, list) or len(keys) != len(parts) or not all(isinstance(key, str) for key in keys):
        raise InputRefused(f"{where}: {name[:80]!r} is no supported container; tuples, lists and dicts are")
    if len(set(keys)) != len(keys):
        raise InputRefused(f"{where}: a {name} has a key twice")
    refuse_unprintable(keys, where)
    return dict(zip(keys, parts, strict=True))


def count_leaves(structure: Any) -> int:
    if not isinstance(structure, dict | tuple | list):
        return 1
    return sum(map(count_leaves, structure.values() if isinstance(structure, dict) else structure))


def fill(structure: Any, results: Sequence[Any]) -> Any:
    """The structure with `results[position]` in place of each position."""
    if isinstance(structure, dict):
        return {key: fill(part, results) for key, part in structure.items()}
    if isinstance(structure, tuple | list):
        return type(structure)(fill(part, results) for part in structure)
    return results[structure]
