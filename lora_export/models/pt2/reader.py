"""A .pt2 file read: its graph, what its caller gives and is given, and where its weights lie. All of it checked."""

from __future__ import annotations

import functools
import hashlib
import math
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_export.errors import InputRefused, refuse_unprintable
from lora_export.models.pt2 import archive
from lora_export.models.pt2.json_fields import (
    STRIDED,
    dtype_of,
    expect,
    items,
    only,
    real,
    size_of,
    table,
    tensor_of,
    text,
    whole,
)
from lora_export.models.pt2.program_types import (
    ITEM_BYTES,
    Exported,
    Graph,
    Named,
    Node,
    Payload,
    Stored,
    Tensor,
    Value,
    Word,
)
from lora_export.storage import json_files

SCHEMA = 8  # the major version of torch's schema that this reader knows: torch 2.5 and later
MOST_OBJECTS = 1_000_000  # of a graph's JSON: 120 layers of a decoder have 320,000
MODEL = re.compile(r"models/([^/]+)\.json")
MEMORY_FORMATS = {1: "contiguous_format", 2: "channels_last", 3: "channels_last_3d", 4: "preserve_format"}
# Containers whose type says nothing but how their children are held.
SEQUENCES = {"builtins.tuple": tuple, "builtins.list": list, "collections.deque": list}
MAPPINGS = ("builtins.dict", "collections.OrderedDict")
OF_TRANSFORMERS = "transformers."  # its ModelOutputs: dicts with a type, which is not imported


def read(path: Path) -> Exported:
    """Read all but the weights. Raises InputRefused for what is no such file, and for what is not supported."""
    with archive.opened(path) as file:
        members = archive.members(file, path)
        if not all(name in members for name in ("archive_format", "archive_version")):
            raise InputRefused(f"{path} is no .pt2 file that torch.export.save wrote (torch 2.10 or later)")
        if archive.content(file, members["archive_format"], path) != b"pt2":
            raise InputRefused(f"{path} is no .pt2 file: it says that its format is another")
        if (version := archive.content(file, members["archive_version"], path)) != b"0":
            raise InputRefused(f"{path} is an archive of version {bytes(version[:20])!r}, and I know 0")
        if archive.content(file, members["byteorder"], path) != b"little" if "byteorder" in members else False:
            raise InputRefused(f"{path} was written with the bytes of numbers in another order than I read")
        if any(name.startswith("data/aotinductor/") for name in members):
            raise InputRefused(f"{path} holds compiled code (AOTInductor), which is not run from a file here")
        models = [match[1] for name in members if (match := MODEL.fullmatch(name))]
        if len(models) != 1:
            raise InputRefused(
                f"{path} holds {len(models)} exported programs ({', '.join(models[:5]) or 'none'}); I read a file with "
                "one, as torch.export.save writes it"
            )
        (model,) = models
        graph = archive.content(file, members[f"models/{model}.json"], path, most=json_files.MAX_JSON)
        weights = _payloads(file, members, path, "weights", model)
        constants = _payloads(file, members, path, "constants", model)
    return _Reader(path, members, {**constants, **weights}).program(graph)


def _payloads(
    file: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], path: Path, folder: str, model: str
) -> dict[str, Payload]:
    """Name -> where its tensor lies. Raises InputRefused for pickles, and for what does not fit its bytes."""
    name = f"data/{folder}/{model}_{folder}_config.json"
    if name not in members:
        raise InputRefused(
            f"{path} has no {name}: an older torch pickled the {folder}, and no pickle is opened here. Export it again "
            "with torch 2.10 or later"
        )
    content = bytes(archive.content(file, members[name], path, most=json_files.MAX_JSON))
    told = table(
        json_files.parse_json(content, f"{name} in {path}", most=MOST_OBJECTS).get("config"), f"{name} in {path}"
    )
    refuse_unprintable(told, str(path))
    return {
        tensor: _payload(table(entry, tensor), members, f"data/{folder}/", f"{path}: {tensor}")
        for tensor, entry in told.items()
    }


def _payload(entry: dict[str, Any], members: Mapping[str, zipfile.ZipInfo], folder: str, place: str) -> Payload:
    file = text(entry.get("path_name"), place)
    if entry.get("use_pickle") is not False or entry.get("tensor_meta") is None:
        raise InputRefused(f"{place} is stored as a pickle, which is not opened here: only plain tensors are read")
    if folder + file not in members:
        raise InputRefused(f"{place} should lie in {folder}{file}, which the archive does not have")
    meta = table(entry["tensor_meta"], place)
    told = tensor_of(meta, place)
    sizes = tuple(size for size in told.sizes if isinstance(size, int))
    strides = [size_of(stride, place) for stride in items(meta.get("strides"), place)]
    offset = size_of(meta.get("storage_offset"), place)
    numbers = [size for size in (*strides, offset) if isinstance(size, int)]
    if len(sizes) < len(told.sizes) or len(numbers) < len(strides) + 1 or len(strides) != len(sizes):
        raise InputRefused(f"{place}: a stored tensor has sizes, strides and an offset in numbers")
    payload = Payload(folder + file, told.dtype, sizes, tuple(numbers[:-1]), numbers[-1])
    held, rest = divmod(members[payload.member].file_size, ITEM_BYTES[payload.dtype])
    count = math.prod(sizes)
    last = payload.offset + sum((size - 1) * stride for size, stride in zip(sizes, payload.strides, strict=True))
    # A view that repeats its numbers would be a small file that takes any memory.
    if rest or (count and (last >= held or count > held)):
        raise InputRefused(f"{place} is {list(sizes)} of {told.dtype}, and {file} does not hold as many")
    return payload


# --- the graph ----------------------------------------------------------------------------------


class _Reader:
    """What turns a graph's JSON into what is checked."""

    def __init__(self, path: Path, members: Mapping[str, zipfile.ZipInfo], payloads: Mapping[str, Payload]):
        self.path, self.members, self.payloads = path, members, payloads

    def program(self, content: bytearray) -> Exported:
        place = f"{self.path}: its graph"
        told = json_files.parse_json(bytes(content), place, most=MOST_OBJECTS)
        version = table(told.get("schema_version"), place)
        if version.get("major") != SCHEMA:
            raise InputRefused(
                f"{self.path} is written in version {str(version.get('major'))[:20]} of torch's schema, and I know "
                f"{SCHEMA}. Export it again with torch 2.10 or later"
            )
        module = table(told.get("graph_module"), place)
        raw = table(module.get("graph"), place)
        graph = self._graph(raw, set(), place)
        signature = table(module.get("signature"), place)
        calls = [
            table(call, place)
            for call in items(module.get("module_call_graph"), place)
            if table(call, place).get("fqn") == ""
        ]
        if len(calls) != 1 or calls[0].get("signature") is None:
            raise InputRefused(f"{place} does not say how the program is called")
        call = table(calls[0]["signature"], place)
        stored, users = self._inputs(items(signature.get("input_specs"), place), raw, graph)
        names = self._input_names(call, [name for name, _ in users])
        outputs = self._outputs(items(signature.get("output_specs"), place), graph, call, module)
        ranges = {
            symbol: self._range(table(bounds, place), symbol)
            for symbol, bounds in table(told.get("range_constraints"), place).items()
        }
        return Exported(
            path=self.path,
            graph=graph,
            inputs={name: tensor for name, (_, tensor) in zip(names, users, strict=True)},
            input_values={name: value for name, (value, _) in zip(names, users, strict=True)},
            stored=tuple(stored),
            outputs=outputs,
            ranges=ranges,
            digest=hashlib.sha256(content).hexdigest(),
            members=self.members,
        )

    def _range(self, bounds: dict[str, Any], symbol: str) -> tuple[int, int | None]:
        low, high = (
            None if bounds.get(side) is None else whole(bounds[side], f"{self.path}: {symbol}")
            for side in ("min_val", "max_val")
        )
        # A program that was traced with two rows says `at least 2`, and runs with one: torch.export checks no less.
        return (0 if low is None or low <= 2 else low), high

    # --- nodes ---

    def _graph(self, raw: dict[str, Any], known: set[str], place: str) -> Graph:
        """A graph; `known` are the values that are there before it. A graph inside another is given its own."""
        known = set(known)
        inputs = tuple(self._graph_input(only(told, place), place) for told in items(raw.get("inputs"), place))
        for name in inputs:
            self._add(name, known, place)
        nodes = []
        for number, told in enumerate(items(raw.get("nodes"), place)):
            node = self._node(table(told, place), number, known)
            for name in _names(node.outputs):
                self._add(name, known, f"{self.path}: node {node.name}")
            nodes.append(node)
        outputs = tuple(self._argument(told, known, place) for told in items(raw.get("outputs"), place))
        return Graph(inputs, tuple(nodes), outputs, raw.get("is_single_tensor_return") is True)

    def _add(self, name: str | None, known: set[str], place: str) -> None:
        if name in known:
            raise InputRefused(f"{place}: {name} is made more than once")
        if name is not None:
            known.add(name)

    def _graph_input(self, told: tuple[str, Any], place: str) -> str | None:
        kind, value = told
        if kind == "as_tensor":
            return text(table(value, place).get("name"), place)
        if kind == "as_sym_int":
            return text(table(value, place).get("as_name"), place)
        if kind in ("as_none", "as_int", "as_float", "as_bool", "as_string"):
            return None
        raise InputRefused(f"{place} takes an input of the kind {kind!r}, which is not supported")

    def _node(self, told: dict[str, Any], number: int, known: set[str]) -> Node:
        target = text(told.get("target"), f"{self.path}: node {number}")
        name = told.get("name")
        name = name if isinstance(name, str) and name.isidentifier() and len(name) < 200 else str(number)
        place = f"{self.path}: node {name} ({target[:80]})"
        inputs = []
        for each in items(told.get("inputs"), place):
            argument = table(each, place)
            inputs.append(Named(text(argument.get("name"), place), self._argument(argument.get("arg"), known, place)))
        named = [each.name for each in inputs if each.name]
        if len(set(named)) != len(named):
            raise InputRefused(f"{place} is given an argument more than once")
        outputs = tuple(self._result(output, place) for output in items(told.get("outputs"), place))
        return Node(target, number, name, tuple(inputs), outputs)

    def _result(self, told: Any, place: str) -> Any:
        kind, value = only(told, place)
        if kind == "as_tensor":
            return text(table(value, place).get("name"), place)
        if kind == "as_tensors":
            return [text(table(each, place).get("name"), place) for each in items(value, place)]
        if kind in ("as_sym_int", "as_sym_bool", "as_sym_float"):
            return text(table(value, place).get("as_name"), place)
        if kind == "as_none":
            return None
        raise InputRefused(f"{place} makes something of the kind {kind!r}, which is not supported")

    def _argument(self, told: Any, known: set[str], place: str) -> Any:
        kind, value = only(told, place)
        readers: dict[str, Callable[[Any], Any]] = {
            "as_none": lambda _: None,
            "as_tensor": lambda each: self._value(table(each, place).get("name"), known, place),
            "as_int": lambda each: whole(each, place),
            "as_float": lambda each: real(each, place),
            "as_bool": lambda each: expect(each, bool, place, "true or false"),
            "as_string": lambda each: text(each, place),
            "as_sym_int": lambda each: self._symbolic(each, known, place, whole),
            "as_sym_float": lambda each: self._symbolic(each, known, place, real),
            "as_sym_bool": lambda each: self._symbolic(
                each, known, place, lambda there, _: expect(there, bool, place, "true or false")
            ),
            "as_optional_tensor": lambda each: self._argument(each, known, place),
            "as_scalar_type": lambda each: Word("dtype", dtype_of(each, place)),
            "as_memory_format": lambda each: Word("memory_format", self._memory_format(each, place)),
            "as_layout": lambda each: Word("layout", self._layout(each, place)),
            "as_device": lambda each: Word("device", text(table(each, place).get("type"), place)),
            "as_graph": lambda each: self._graph(table(table(each, place).get("graph"), place), set(), place),
        }
        plural = {
            **{f"{name}s": name for name in ("as_tensor", "as_int", "as_float", "as_bool", "as_string")},
            **{f"{name}s": name for name in ("as_sym_int", "as_sym_float", "as_sym_bool", "as_optional_tensor")},
        }
        if kind in plural:
            return [readers[plural[kind]](each) for each in items(value, place)]
        if kind not in readers:
            raise InputRefused(f"{place} is given an argument of the kind {kind!r}, which is not supported")
        return readers[kind](value)

    def _value(self, name: Any, known: set[str], place: str) -> Value:
        if text(name, place) not in known:
            raise InputRefused(f"{place} reads {name!r}, which nothing before it makes")
        return Value(name)

    def _symbolic(self, told: Any, known: set[str], place: str, number: Callable[[Any, str], Any]) -> Any:
        kind, value = only(told, place)
        return self._value(value, known, place) if kind == "as_name" else number(value, place)

    def _memory_format(self, number: Any, place: str) -> str:
        if whole(number, place) not in MEMORY_FORMATS:
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
        told = table(raw.get("tensor_values"), place)
        if len(specs) != len(graph.inputs):
            raise InputRefused(f"{place} names {len(specs)} inputs, and the graph has {len(graph.inputs)}")
        stored: list[Stored] = []
        users: list[tuple[str, Tensor]] = []
        for spec, value in zip(specs, graph.inputs, strict=True):
            kind, each = only(spec, place)
            if kind in ("parameter", "buffer", "tensor_constant"):
                stored.append(self._stored(kind, table(each, place), value))
            elif kind == "user_input":
                if value is None:
                    continue  # None, or a number that the graph has as a constant
                if value not in told:
                    raise InputRefused(
                        f"{self.path} takes {value}, which is no tensor; only tensors are given to programs"
                    )
                users.append((value, tensor_of(table(told[value], place), f"{self.path}: the input {value}")))
            elif kind != "constant_input":
                raise InputRefused(f"{self.path} takes an input of the kind {kind!r}, which is not supported")
        twice = sorted(name for name, count in Counter(there.name for there in stored).items() if count > 1)
        if twice:
            raise InputRefused(f"{place} names {', '.join(twice[:5])} more than once")
        return stored, users

    def _stored(self, kind: str, told: dict[str, Any], value: str | None) -> Stored:
        name = text(told.get(f"{kind}_name"), f"{self.path}: its signature")
        refuse_unprintable([name], str(self.path))
        if text(table(told.get("arg"), name).get("name"), name) != value or name not in self.payloads:
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
        names = [text(name, place) for name in items(given, place)]
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
        kinds = [only(spec, place)[0] for spec in specs]
        for kind in kinds:
            if kind != "user_output":
                raise InputRefused(
                    f"{self.path} is no function of its inputs alone: among its outputs is a {kind.replace('_', ' ')}, "
                    "which is not supported"
                )
        fields = table(module.get("treespec_namedtuple_fields", {}), place)
        count = len(graph.outputs)
        if len(kinds) != count:
            raise InputRefused(f"{place} are {count}, and its signature names {len(kinds)}")
        structure = self._structure(call.get("out_spec"), place, iter(range(count)), fields)
        if _leaves(structure) != count:
            raise InputRefused(f"{place} are {count}, and their structure has {_leaves(structure)}")
        return structure

    def _structure(self, told: Any, place: str, places: Iterator[int], fields: Mapping[str, Any]) -> Any:
        """A structure with the number of each leaf in its place. No type in it is looked up."""
        wrapped = '{"structure": ' + text(told, place) + "}"
        parsed = json_files.parse_json(wrapped.encode(errors="surrogatepass"), place)
        spec = items(parsed.get("structure"), place)
        if len(parsed) != 1 or len(spec) != 2 or spec[0] != 1:
            raise InputRefused(f"{place}: a structure is told in version 1, and not so")
        return self._built(table(spec[1], place), place, places, fields)

    def _built(self, spec: dict[str, Any], place: str, places: Iterator[int], fields: Mapping[str, Any]) -> Any:
        kind, children = spec.get("type"), items(spec.get("children_spec"), place)
        if kind is None:
            return next(places, -1)
        name = text(kind, place)
        made = [self._built(table(child, place), place, places, fields) for child in children]
        if name in SEQUENCES:
            return SEQUENCES[name](made)
        keys: Any = None
        if name in MAPPINGS or name.startswith(OF_TRANSFORMERS):
            told = '{"keys": ' + text(spec.get("context"), place) + "}"
            keys = json_files.parse_json(told.encode(errors="surrogatepass"), place).get("keys")
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
