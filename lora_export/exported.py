"""A program that `torch.export.save` wrote (.pt2), read so that nothing in the file can run. Knows no PyTorch.

`torch.export.load` unpickles the sample inputs, sympifies sizes, imports what a structure's type names, looks any
`torch.` name up and compiles guards: it trusts its file. Here the archive is a zip of stored members, the graph and
what is said of the tensors are JSON, and the weights are their bytes. No pickle is opened, no text is evaluated, and
no name in the file is looked up anywhere but in the file, or in lists of ours.

Of the guards, those are kept that the sizes of the inputs tell: an axis of one size, axes of the same size, and their
ranges. What else they may say (a size that must be even) is not read.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lora_export import files
from lora_export.errors import InputRefused, refuse_unprintable

SCHEMA = 8  # the major version of torch's schema that this reader knows: torch 2.5 and later
AT_ONCE = 1 << 26  # bytes that are read in one piece: a zip's directory may not ask for more
MOST_OBJECTS = 1_000_000  # of a graph's JSON: 120 layers of a decoder have 320,000
MODEL = re.compile(r"models/([^/]+)\.json")
SYMBOL = re.compile(r"Symbol\('(\w{1,64})'(?:, \w{1,32}=(?:True|False))*\)|(?!\d)(\w{1,64})")
NUMBERS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}  # as torch writes them

# torch's own numbers for them (torch/_export/serde/schema.py); NumPy's and ml_dtypes' names.
DTYPES = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float16",
    7: "float32",
    8: "float64",
    12: "bool",
    13: "bfloat16",
    28: "uint16",
    34: "uint32",
    35: "uint64",
}
ITEM_BYTES = {name: 1 if name == "bool" else int(re.sub(r"\D", "", name)) // 8 for name in DTYPES.values()}
MEMORY_FORMATS = {1: "contiguous_format", 2: "channels_last", 3: "channels_last_3d", 4: "preserve_format"}
STRIDED = 7

# Containers whose type says nothing but how their children are held.
SEQUENCES = {"builtins.tuple": tuple, "builtins.list": list, "collections.deque": list}
MAPPINGS = ("builtins.dict", "collections.OrderedDict")
OF_TRANSFORMERS = "transformers."  # its ModelOutputs: dicts with a type, which is not imported


class Symbol(NamedTuple):
    """A size that may vary."""

    name: str  # the same for sizes that are the same; empty where it is an expression of others
    hint: int | None  # what it was when the program was exported


class Value(NamedTuple):
    """What an input or an earlier node is called."""

    name: str


class Word(NamedTuple):
    """What torch has a name for: a `dtype`, a `memory_format`, a `layout` or a `device`."""

    kind: str
    name: str


class Named(NamedTuple):
    """One argument of a node, under the operator's own name for it; a higher-order one has no names."""

    name: str
    value: Any  # Value, Word, Graph, a number, a string, None, or a list of these


@dataclass(frozen=True)
class Node:
    target: str  # as the file spells it
    number: int  # in its graph
    name: str  # for messages: nothing says that it is the only one's
    inputs: tuple[Named, ...]
    outputs: tuple[Any, ...]  # a name, a list of names, or None for what is not named, of each result


@dataclass(frozen=True)
class Graph:
    """Nodes in the order in which they run; each reads only what is there before it."""

    inputs: tuple[str | None, ...]  # None for a constant that no node reads
    nodes: tuple[Node, ...]
    outputs: tuple[Any, ...]  # as arguments are
    is_single: bool  # one tensor is handed out as itself


@dataclass(frozen=True)
class Tensor:
    """What is said of a tensor."""

    dtype: str
    sizes: tuple[int | Symbol, ...]


class Payload(NamedTuple):
    """A tensor that is stored: a view of a member's bytes."""

    member: str
    dtype: str
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # in numbers, not bytes
    offset: int


@dataclass(frozen=True)
class Stored:
    """A tensor of the program's own."""

    value: str  # what the graph calls it
    name: str  # what the module calls it
    kind: str  # `parameter`, `buffer` or `constant`
    payload: Payload
    persistent: bool = True


@dataclass(frozen=True, eq=False)
class Exported:
    """A program as its file describes it, checked."""

    path: Path
    graph: Graph
    inputs: Mapping[str, Tensor]  # by the names of forward's parameters, in their order
    input_values: Mapping[str, str]  # what the graph calls them
    stored: tuple[Stored, ...]
    outputs: Any  # the structure that is handed out: a tuple, list or dict of places in graph.outputs, or one
    ranges: Mapping[str, tuple[int, int | None]]  # symbol -> least and greatest size
    digest: str  # of the graph's JSON
    members: Mapping[str, zipfile.ZipInfo] = field(repr=False)

    def content(self, member: str) -> bytearray:
        """The bytes of a member, its checksum compared."""
        with _opened(self.path) as archive:
            return _content(archive, self.members[member], self.path)


def read(path: Path) -> Exported:
    """Read all but the weights. Raises InputRefused for what is no such file, and for what is not supported."""
    with _opened(path) as archive:
        members = _members(archive, path)
        if not all(name in members for name in ("archive_format", "archive_version")):
            raise InputRefused(f"{path} is no .pt2 file that torch.export.save wrote (torch 2.10 or later)")
        if _content(archive, members["archive_format"], path) != b"pt2":
            raise InputRefused(f"{path} is no .pt2 file: it says that its format is another")
        if (version := _content(archive, members["archive_version"], path)) != b"0":
            raise InputRefused(f"{path} is an archive of version {bytes(version[:20])!r}, and I know 0")
        if _content(archive, members["byteorder"], path) != b"little" if "byteorder" in members else False:
            raise InputRefused(f"{path} was written with the bytes of numbers in another order than I read")
        models = [match[1] for name in members if (match := MODEL.fullmatch(name))]
        if len(models) != 1:
            raise InputRefused(
                f"{path} holds {len(models)} exported programs ({', '.join(models[:5]) or 'none'}); I read a file with "
                "one, as torch.export.save writes it"
            )
        (model,) = models
        text = _content(archive, members[f"models/{model}.json"], path, most=files.MAX_JSON)
        weights = _payloads(archive, members, path, "weights", model)
        constants = _payloads(archive, members, path, "constants", model)
    return _Reader(path, members, {**constants, **weights}).program(text)


# --- the archive --------------------------------------------------------------------------------


class _Bounded:
    """A file of which nothing reads more than a little in one piece: a directory that claims gigabytes is refused."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.seek, self.tell, self.seekable, self.close = file.seek, file.tell, file.seekable, file.close

    def read(self, size: int = -1) -> bytes:
        content = self.file.read(min(size, AT_ONCE + 1) if size >= 0 else AT_ONCE + 1)
        if len(content) > AT_ONCE:
            raise zipfile.BadZipFile("its directory claims more bytes than such a file needs")
        return content


class _opened:  # noqa: N801 - used as a function is
    """The zip file at a path, while active. Raises InputRefused for whatever zipfile raises."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> zipfile.ZipFile:
        self.file = files.open_regular(self.path)
        try:
            return zipfile.ZipFile(_Bounded(self.file))
        except Exception as error:  # zipfile has a dozen kinds for this
            self.file.close()
            raise InputRefused(f"{self.path} is no .pt2 file: {error}") from error

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """What lies in the archive's one folder, by names below it. Raises InputRefused for what torch would not write."""
    found: dict[str, zipfile.ZipInfo] = {}
    roots = set()
    refuse_unprintable((info.filename for info in archive.infolist()), str(path))
    for info in archive.infolist():
        root, _, name = info.filename.partition("/")
        roots.add(root)
        if not name or "\\" in name or any(part in ("", ".", "..") for part in (root, *name.split("/"))):
            raise InputRefused(f"{path} has a member {info.filename!r}, which leads out of its folder")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise InputRefused(f"{path}: its member {name} is a link")
        if name in found:
            raise InputRefused(f"{path} holds {name} more than once")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise InputRefused(f"{path}: its member {name} is packed; torch.export.save stores members as they are")
        found[name] = info
    if len(roots) > 1:
        raise InputRefused(f"{path} has {len(roots)} folders at its top, where torch.export.save writes one")
    total, size = sum(info.file_size for info in found.values()), path.stat().st_size
    if total > size:
        raise InputRefused(f"{path}: its members claim {total:,} bytes, and it has {size:,}")
    return found


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, *, most: int | None = None) -> bytearray:
    if most is not None and info.file_size > most:
        raise InputRefused(f"{path}: {info.filename} has more than {most:,} bytes, which no such file needs")
    content = bytearray()
    try:
        with archive.open(info) as member:
            while piece := member.read(AT_ONCE):
                content += piece
    except Exception as error:  # zipfile has a dozen kinds for this
        raise InputRefused(f"{path} is damaged: {error}") from error
    if len(content) != info.file_size:
        raise InputRefused(f"{path} is cut short: {info.filename} should have {info.file_size:,} bytes")
    return content


def _payloads(
    archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], path: Path, folder: str, model: str
) -> dict[str, Payload]:
    """Name -> where its tensor lies. Raises InputRefused for pickles, and for what does not fit its bytes."""
    name = f"data/{folder}/{model}_{folder}_config.json"
    if name not in members:
        raise InputRefused(
            f"{path} has no {name}: an older torch pickled the {folder}, and no pickle is opened here. Export it again "
            "with torch 2.10 or later"
        )
    text = bytes(_content(archive, members[name], path, most=files.MAX_JSON))
    told = _table(files.parse_json(text, f"{name} in {path}", most=MOST_OBJECTS).get("config"), f"{name} in {path}")
    refuse_unprintable(told, str(path))
    return {
        tensor: _payload(_table(entry, tensor), members, f"data/{folder}/", f"{path}: {tensor}")
        for tensor, entry in told.items()
    }


def _payload(entry: dict[str, Any], members: Mapping[str, zipfile.ZipInfo], folder: str, place: str) -> Payload:
    file = _text(entry.get("path_name"), place)
    if entry.get("use_pickle") is not False or entry.get("tensor_meta") is None:
        raise InputRefused(f"{place} is stored as a pickle, which is not opened here: only plain tensors are read")
    if folder + file not in members:
        raise InputRefused(f"{place} should lie in {folder}{file}, which the archive does not have")
    meta = _table(entry["tensor_meta"], place)
    told = _tensor(meta, place)
    sizes = tuple(size for size in told.sizes if isinstance(size, int))
    strides = [_size(stride, place) for stride in _list(meta.get("strides"), place)]
    offset = _size(meta.get("storage_offset"), place)
    numbers = [size for size in (*strides, offset) if isinstance(size, int)]
    if len(sizes) < len(told.sizes) or len(numbers) < len(strides) + 1 or len(strides) != len(sizes):
        raise InputRefused(f"{place}: a stored tensor has sizes, strides and an offset in numbers")
    payload = Payload(folder + file, told.dtype, sizes, tuple(numbers[:-1]), numbers[-1])
    held = members[payload.member].file_size / ITEM_BYTES[payload.dtype]
    count = math.prod(sizes)
    last = payload.offset + sum((size - 1) * stride for size, stride in zip(sizes, payload.strides, strict=True))
    # A view that repeats its numbers would be a small file that takes any memory.
    if count and (last >= held or count > held):
        raise InputRefused(f"{place} is {list(sizes)} of {told.dtype}, and {file} does not hold as many")
    return payload


# --- the graph ----------------------------------------------------------------------------------


def _is(value: Any, kind: type | tuple[type, ...], place: str, what: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InputRefused(f"{place}: where {what} should stand is {str(value)[:80]!r}")
    return value


def _table(value: Any, place: str) -> dict[str, Any]:
    return _is(value, dict, place, "a JSON object")  # type: ignore[no-any-return]


def _list(value: Any, place: str) -> list[Any]:
    return _is(value, list, place, "a list")  # type: ignore[no-any-return]


def _text(value: Any, place: str) -> str:
    return _is(value, str, place, "a text")  # type: ignore[no-any-return]


def _int(value: Any, place: str) -> int:
    number: int = _is(value, int, place, "a whole number")
    if not -(1 << 63) <= number < 1 << 63:
        raise InputRefused(f"{place}: {number.bit_length()} bits are too many for a number")
    return number


def _float(value: Any, place: str) -> float:
    if isinstance(value, str) and value in NUMBERS:
        return NUMBERS[value]
    number: float = _is(value, (int, float), place, "a number")
    try:
        return float(number)
    except OverflowError:
        raise InputRefused(f"{place}: a number is beyond number") from None


def _only(table: Any, place: str) -> tuple[str, Any]:
    """The one field of a union."""
    fields = _table(table, place)
    if len(fields) != 1:
        raise InputRefused(f"{place}: one field is expected, and there are {', '.join(fields) or 'none'}")
    return next(iter(fields.items()))


def _size(told: Any, place: str) -> int | Symbol:
    kind, value = _only(told, place)
    if kind == "as_int":
        if _int(value, place) < 0:
            raise InputRefused(f"{place}: a size is negative")
        return int(value)
    if kind != "as_expr":
        raise InputRefused(f"{place}: a size is told as {kind}")
    expression = _table(value, place)
    match = SYMBOL.fullmatch(_text(expression.get("expr_str"), place))
    hint = expression.get("hint")
    number = None if hint is None else _int(_table(hint, place).get("as_int"), place)
    return Symbol((match[1] or match[2]) if match else "", number)


def _tensor(meta: dict[str, Any], place: str) -> Tensor:
    if meta.get("layout") != STRIDED:
        raise InputRefused(f"{place} is no dense tensor; only such are supported")
    return Tensor(
        _dtype(meta.get("dtype"), place), tuple(_size(size, place) for size in _list(meta.get("sizes"), place))
    )


def _dtype(number: Any, place: str) -> str:
    if _int(number, place) not in DTYPES:
        raise InputRefused(f"{place} is of torch's type {number}, which is not supported ({', '.join(ITEM_BYTES)} are)")
    return DTYPES[number]


class _Reader:
    """What turns a graph's JSON into what is checked."""

    def __init__(self, path: Path, members: Mapping[str, zipfile.ZipInfo], payloads: Mapping[str, Payload]):
        self.path, self.members, self.payloads = path, members, payloads

    def program(self, text: bytearray) -> Exported:
        place = f"{self.path}: its graph"
        whole = files.parse_json(bytes(text), place, most=MOST_OBJECTS)
        version = _table(whole.get("schema_version"), place)
        if version.get("major") != SCHEMA:
            raise InputRefused(
                f"{self.path} is written in version {str(version.get('major'))[:20]} of torch's schema, and I know "
                f"{SCHEMA}. Export it again with torch 2.10 or later"
            )
        module = _table(whole.get("graph_module"), place)
        raw = _table(module.get("graph"), place)
        graph = self._graph(raw, set(), place)
        signature = _table(module.get("signature"), place)
        calls = [
            _table(call, place)
            for call in _list(module.get("module_call_graph"), place)
            if _table(call, place).get("fqn") == ""
        ]
        if len(calls) != 1 or calls[0].get("signature") is None:
            raise InputRefused(f"{place} does not say how the program is called")
        call = _table(calls[0]["signature"], place)
        stored, users = self._inputs(_list(signature.get("input_specs"), place), raw, graph)
        names = self._input_names(call, [name for name, _ in users])
        outputs = self._outputs(_list(signature.get("output_specs"), place), graph, call, module)
        ranges = {
            symbol: self._range(_table(bounds, place), symbol)
            for symbol, bounds in _table(whole.get("range_constraints"), place).items()
        }
        return Exported(
            path=self.path,
            graph=graph,
            inputs={name: tensor for name, (_, tensor) in zip(names, users, strict=True)},
            input_values={name: value for name, (value, _) in zip(names, users, strict=True)},
            stored=tuple(stored),
            outputs=outputs,
            ranges=ranges,
            digest=hashlib.sha256(text).hexdigest(),
            members=self.members,
        )

    def _range(self, bounds: dict[str, Any], symbol: str) -> tuple[int, int | None]:
        low, high = (
            None if bounds.get(side) is None else _int(bounds[side], f"{self.path}: {symbol}")
            for side in ("min_val", "max_val")
        )
        # A program that was traced with two rows says `at least 2`, and runs with one: torch.export checks no less.
        return (0 if low is None or low <= 2 else low), high

    # --- nodes ---

    def _graph(self, raw: dict[str, Any], known: set[str], place: str) -> Graph:
        """A graph; `known` are the values that are there before it. A graph inside another is given its own."""
        known = set(known)
        inputs = tuple(self._graph_input(_only(told, place), place) for told in _list(raw.get("inputs"), place))
        for name in inputs:
            self._add(name, known, place)
        nodes = []
        for number, told in enumerate(_list(raw.get("nodes"), place)):
            node = self._node(_table(told, place), number, known)
            for name in _names(node.outputs):
                self._add(name, known, f"{self.path}: node {node.name}")
            nodes.append(node)
        outputs = tuple(self._argument(told, known, place) for told in _list(raw.get("outputs"), place))
        return Graph(inputs, tuple(nodes), outputs, raw.get("is_single_tensor_return") is True)

    def _add(self, name: str | None, known: set[str], place: str) -> None:
        if name in known:
            raise InputRefused(f"{place}: {name} is made more than once")
        if name is not None:
            known.add(name)

    def _graph_input(self, told: tuple[str, Any], place: str) -> str | None:
        kind, value = told
        if kind == "as_tensor":
            return _text(_table(value, place).get("name"), place)
        if kind == "as_sym_int":
            return _text(_table(value, place).get("as_name"), place)
        if kind in ("as_none", "as_int", "as_float", "as_bool", "as_string"):
            return None
        raise InputRefused(f"{place} takes an input of the kind {kind!r}, which is not supported")

    def _node(self, told: dict[str, Any], number: int, known: set[str]) -> Node:
        target = _text(told.get("target"), f"{self.path}: node {number}")
        name = told.get("name")
        name = name if isinstance(name, str) and name.isidentifier() and len(name) < 200 else str(number)
        place = f"{self.path}: node {name} ({target[:80]})"
        inputs = []
        for each in _list(told.get("inputs"), place):
            argument = _table(each, place)
            inputs.append(Named(_text(argument.get("name"), place), self._argument(argument.get("arg"), known, place)))
        named = [each.name for each in inputs if each.name]
        if len(set(named)) != len(named):
            raise InputRefused(f"{place} is given an argument more than once")
        outputs = tuple(self._result(output, place) for output in _list(told.get("outputs"), place))
        return Node(target, number, name, tuple(inputs), outputs)

    def _result(self, told: Any, place: str) -> Any:
        kind, value = _only(told, place)
        if kind == "as_tensor":
            return _text(_table(value, place).get("name"), place)
        if kind == "as_tensors":
            return [_text(_table(each, place).get("name"), place) for each in _list(value, place)]
        if kind in ("as_sym_int", "as_sym_bool", "as_sym_float"):
            return _text(_table(value, place).get("as_name"), place)
        if kind == "as_none":
            return None
        raise InputRefused(f"{place} makes something of the kind {kind!r}, which is not supported")

    def _argument(self, told: Any, known: set[str], place: str) -> Any:
        kind, value = _only(told, place)
        readers: dict[str, Callable[[Any], Any]] = {
            "as_none": lambda _: None,
            "as_tensor": lambda each: self._value(_table(each, place).get("name"), known, place),
            "as_int": lambda each: _int(each, place),
            "as_float": lambda each: _float(each, place),
            "as_bool": lambda each: _is(each, bool, place, "true or false"),
            "as_string": lambda each: _text(each, place),
            "as_sym_int": lambda each: self._symbolic(each, known, place, _int),
            "as_sym_float": lambda each: self._symbolic(each, known, place, _float),
            "as_sym_bool": lambda each: self._symbolic(
                each, known, place, lambda there, _: _is(there, bool, place, "true or false")
            ),
            "as_optional_tensor": lambda each: self._argument(each, known, place),
            "as_scalar_type": lambda each: Word("dtype", _dtype(each, place)),
            "as_memory_format": lambda each: Word("memory_format", self._memory_format(each, place)),
            "as_layout": lambda each: Word("layout", self._layout(each, place)),
            "as_device": lambda each: Word("device", _text(_table(each, place).get("type"), place)),
            "as_graph": lambda each: self._graph(_table(_table(each, place).get("graph"), place), set(), place),
        }
        plural = {
            **{f"{name}s": name for name in ("as_tensor", "as_int", "as_float", "as_bool", "as_string")},
            **{f"{name}s": name for name in ("as_sym_int", "as_sym_float", "as_sym_bool", "as_optional_tensor")},
        }
        if kind in plural:
            return [readers[plural[kind]](each) for each in _list(value, place)]
        if kind not in readers:
            raise InputRefused(f"{place} is given an argument of the kind {kind!r}, which is not supported")
        return readers[kind](value)

    def _value(self, name: Any, known: set[str], place: str) -> Value:
        if _text(name, place) not in known:
            raise InputRefused(f"{place} reads {name!r}, which nothing before it makes")
        return Value(name)

    def _symbolic(self, told: Any, known: set[str], place: str, number: Callable[[Any, str], Any]) -> Any:
        kind, value = _only(told, place)
        return self._value(value, known, place) if kind == "as_name" else number(value, place)

    def _memory_format(self, number: Any, place: str) -> str:
        if _int(number, place) not in MEMORY_FORMATS:
            raise InputRefused(f"{place}: there is no memory format {number}")
        return MEMORY_FORMATS[number]

    def _layout(self, number: Any, place: str) -> str:
        if number != STRIDED:
            raise InputRefused(f"{place}: only dense tensors are supported")
        return "strided"

    # --- the signature ---

    def _inputs(
        self, specs: list[Any], raw: dict[str, Any], graph: Graph
    ) -> tuple[list[Stored], list[tuple[str, Tensor]]]:
        """The program's own tensors, and what its caller gives: the graph's name and what is said of it."""
        place = f"{self.path}: its signature"
        told = _table(raw.get("tensor_values"), place)
        if len(specs) != len(graph.inputs):
            raise InputRefused(f"{place} names {len(specs)} inputs, and the graph has {len(graph.inputs)}")
        stored: list[Stored] = []
        users: list[tuple[str, Tensor]] = []
        for spec, value in zip(specs, graph.inputs, strict=True):
            kind, each = _only(spec, place)
            if kind in ("parameter", "buffer", "tensor_constant"):
                stored.append(self._stored(kind, _table(each, place), value))
            elif kind == "user_input":
                if value is None:
                    continue  # None, or a number that the graph has as a constant
                if value not in told:
                    raise InputRefused(
                        f"{self.path} takes {value}, which is no tensor; only tensors are given to programs"
                    )
                users.append((value, _tensor(_table(told[value], place), f"{self.path}: the input {value}")))
            elif kind != "constant_input":
                raise InputRefused(f"{self.path} takes an input of the kind {kind!r}, which is not supported")
        twice = {there.name for there in stored if sum(there.name == other.name for other in stored) > 1}
        if twice:
            raise InputRefused(f"{place} names {', '.join(sorted(twice)[:5])} more than once")
        return stored, users

    def _stored(self, kind: str, told: dict[str, Any], value: str | None) -> Stored:
        name = _text(told.get(f"{kind}_name"), f"{self.path}: its signature")
        refuse_unprintable([name], str(self.path))
        if _text(_table(told.get("arg"), name).get("name"), name) != value or name not in self.payloads:
            raise InputRefused(f"{self.path}: the {kind.replace('_', ' ')} {name} is not stored in it")
        short = "constant" if kind == "tensor_constant" else kind
        persistent = kind == "parameter" or told.get("persistent") is True
        return Stored(str(value), name, short, self.payloads[name], persistent)

    def _input_names(self, call: dict[str, Any], values: Sequence[str]) -> list[str]:
        """Under which names a caller gives the inputs: forward's parameters, or the graph's own names for parts."""
        place = f"{self.path}: how it is called"
        structure = self._structure(call.get("in_spec"), place, iter(range(1 << 20)), {})
        positional, keywords = structure if isinstance(structure, tuple) and len(structure) == 2 else ((), {})
        given = call.get("forward_arg_names") or []
        flat: list[str | None] = []
        names = [_text(name, place) for name in _list(given, place)]
        if isinstance(positional, tuple) and isinstance(keywords, dict):
            spelled = [*names[: len(positional)], *([None] * (len(positional) - len(names)))]
            for name, part in [*zip(spelled, positional, strict=True), *keywords.items()]:
                flat += [name] if isinstance(part, int) else [None] * _leaves(part)
        return self._told_apart(flat, values)

    def _told_apart(self, flat: Sequence[str | None], values: Sequence[str]) -> list[str]:
        # Leaves that are no tensors have no value: then the names cannot be laid beside the values, and theirs serve.
        names = list(values)
        if len(flat) == len(values):
            names = [value if name is None else name for name, value in zip(flat, values, strict=True)]
        refuse_unprintable(names, str(self.path))
        if len(set(names)) != len(names):
            raise InputRefused(f"{self.path} names two of its inputs alike")
        return names

    def _outputs(self, specs: list[Any], graph: Graph, call: dict[str, Any], module: dict[str, Any]) -> Any:
        place = f"{self.path}: its outputs"
        kinds = [_only(spec, place)[0] for spec in specs]
        for kind in kinds:
            if kind != "user_output":
                raise InputRefused(
                    f"{self.path} is no function of its inputs alone: among its outputs is a {kind.replace('_', ' ')}, "
                    "which is not supported"
                )
        fields = _table(module.get("treespec_namedtuple_fields", {}), place)
        count = len(graph.outputs)
        if len(kinds) != count:
            raise InputRefused(f"{place} are {count}, and its signature names {len(kinds)}")
        structure = self._structure(call.get("out_spec"), place, iter(range(count)), fields)
        if _leaves(structure) != count:
            raise InputRefused(f"{place} are {count}, and their structure has {_leaves(structure)}")
        return structure

    def _structure(self, told: Any, place: str, places: Iterator[int], fields: Mapping[str, Any]) -> Any:
        """A structure with the number of each leaf in its place. No type in it is looked up."""
        whole = files.parse_json(b'{"structure": ' + _text(told, place).encode() + b"}", place)
        spec = _list(whole.get("structure"), place)
        if len(whole) != 1 or len(spec) != 2 or spec[0] != 1:
            raise InputRefused(f"{place}: a structure is told in version 1, and not so")
        return self._built(_table(spec[1], place), place, places, fields)

    def _built(self, spec: dict[str, Any], place: str, places: Iterator[int], fields: Mapping[str, Any]) -> Any:
        kind, children = spec.get("type"), _list(spec.get("children_spec"), place)
        if kind is None:
            return next(places, -1)
        name = _text(kind, place)
        made = [self._built(_table(child, place), place, places, fields) for child in children]
        if name in SEQUENCES:
            return SEQUENCES[name](made)
        keys: Any = None
        if name in MAPPINGS or name.startswith(OF_TRANSFORMERS):
            told = _text(spec.get("context"), place).encode()
            keys = files.parse_json(b'{"keys": ' + told + b"}", place).get("keys")
        elif name == "collections.namedtuple" or name in fields:
            return tuple(made)
        if not isinstance(keys, list) or len(keys) != len(made) or not all(isinstance(key, str) for key in keys):
            raise InputRefused(
                f"{place}: a {name[:80]!r} is no container that is supported; tuples, lists and dicts are"
            )
        if len(set(keys)) != len(keys):
            raise InputRefused(f"{place}: a key of a {name} stands in it twice")
        refuse_unprintable(keys, place)
        return dict(zip(keys, made, strict=True))


def _names(outputs: Sequence[Any]) -> Iterator[str]:
    for output in outputs:
        if isinstance(output, str):
            yield output
        elif output is not None:
            yield from output


def _leaves(structure: Any) -> int:
    if isinstance(structure, dict):
        structure = structure.values()
    elif not isinstance(structure, tuple | list):
        return 1
    return functools.reduce(lambda count, part: count + _leaves(part), structure, 0)
