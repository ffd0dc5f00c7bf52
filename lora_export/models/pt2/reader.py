"""Read a .pt2 file: its graph, its inputs and outputs, and the positions of its weights. All of it is checked."""

from __future__ import annotations

import hashlib
import math
import re
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_export.artifacts import archive
from lora_export.errors import InputRefused, refuse_unprintable
from lora_export.isolation.limits import MAX_JSON
from lora_export.models.pt2.graph_json import (
    ITEM_BYTES,
    Graph,
    ProgramDescription,
    ProgramTensor,
    StoredArray,
    TensorType,
    count_leaves,
    integer,
    json_list,
    json_object,
    read_graph,
    read_structure,
    single_field,
    size_of,
    string,
    tensor_type_of,
)
from lora_export.storage import json_files

SCHEMA = 8  # the major version of torch's schema that is read: torch 2.5 and later
MAX_GRAPH_OBJECTS = 1_000_000  # in a graph's JSON: 120 layers of a decoder have 320,000
MAX_LEAVES = 1 << 20  # in the structure of the inputs
MODEL_FILE = re.compile(r"models/([^/]+)\.json")


def read(path: Path) -> ProgramDescription:
    """Read all but the weights. Raises InputRefused for a file that is no such program, or is not supported."""
    with archive.opened(path) as file:
        members = archive.members(file, path)
        _refuse_other_formats(file, members, path)
        model = _model_name(members, path)
        graph = archive.content(file, members[f"models/{model}.json"], path, most=MAX_JSON)
        weights = _stored_arrays(file, members, path, "weights", model)
        constants = _stored_arrays(file, members, path, "constants", model)
    return _ProgramReader(path, members, {**constants, **weights}).description(graph)


def _refuse_other_formats(file: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], path: Path) -> None:
    if not all(name in members for name in ("archive_format", "archive_version")):
        raise InputRefused(f"{path} is no .pt2 file that torch.export.save wrote (torch 2.10 or later)")
    if archive.content(file, members["archive_format"], path) != b"pt2":
        raise InputRefused(f"{path} is no .pt2 file: its archive_format is another")
    if (version := archive.content(file, members["archive_version"], path)) != b"0":
        raise InputRefused(f"{path} is an archive of version {bytes(version[:20])!r}; only version 0 is supported")
    if "byteorder" in members and archive.content(file, members["byteorder"], path) != b"little":
        raise InputRefused(f"{path} has a byte order other than little-endian, which is not supported")
    if any(name.startswith("data/aotinductor/") for name in members):
        raise InputRefused(f"{path} contains compiled code (AOTInductor), which lora-export does not run from a file")


def _model_name(members: Mapping[str, zipfile.ZipInfo], path: Path) -> str:
    models = [match[1] for name in members if (match := MODEL_FILE.fullmatch(name))]
    if len(models) != 1:
        raise InputRefused(
            f"{path} contains {len(models)} exported programs ({', '.join(models[:5]) or 'none'}); a file with one is "
            "supported, as torch.export.save writes it"
        )
    return models[0]


# --- stored tensors -----------------------------------------------------------------------------


def _stored_arrays(
    file: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], path: Path, folder: str, model: str
) -> dict[str, StoredArray]:
    """The data of each tensor by name. Raises InputRefused for pickles, and for data that do not fit their bytes."""
    name = f"data/{folder}/{model}_{folder}_config.json"
    if name not in members:
        raise InputRefused(
            f"{path} has no {name}: an older torch pickled the {folder}, and lora-export opens no pickle. Export it "
            "again with torch 2.10 or later"
        )
    content = bytes(archive.content(file, members[name], path, most=MAX_JSON))
    where = f"{name} in {path}"
    entries = json_object(json_files.parse_json(content, where, most=MAX_GRAPH_OBJECTS).get("config"), where)
    refuse_unprintable(entries, str(path))
    return {
        tensor: _stored_array(json_object(entry, tensor), members, f"data/{folder}/", f"{path}: {tensor}")
        for tensor, entry in entries.items()
    }


def _stored_array(
    entry: dict[str, Any], members: Mapping[str, zipfile.ZipInfo], folder: str, where: str
) -> StoredArray:
    member = folder + string(entry.get("path_name"), where)
    if entry.get("use_pickle") is not False or entry.get("tensor_meta") is None:
        raise InputRefused(
            f"{where} is stored as a pickle, and lora-export opens no pickle: only plain tensors are read"
        )
    if member not in members:
        raise InputRefused(f"{where} should be stored in {member}, which the archive does not have")
    meta = json_object(entry["tensor_meta"], where)
    type_ = tensor_type_of(meta, where)
    sizes = tuple(size for size in type_.sizes if isinstance(size, int))
    strides = [size_of(stride, where) for stride in json_list(meta.get("strides"), where)]
    offset = size_of(meta.get("storage_offset"), where)
    numbers = [size for size in (*strides, offset) if isinstance(size, int)]
    if len(sizes) < len(type_.sizes) or len(numbers) < len(strides) + 1 or len(strides) != len(sizes):
        raise InputRefused(f"{where}: the sizes, strides and offset of a stored tensor must be numbers")
    data = StoredArray(member, type_.dtype, sizes, tuple(numbers[:-1]), numbers[-1])
    available, rest = divmod(members[member].file_size, ITEM_BYTES[data.dtype])
    count = math.prod(sizes)
    last = data.offset + sum((size - 1) * stride for size, stride in zip(sizes, data.strides, strict=True))
    # A view that repeats its numbers would be a small file that takes any amount of memory.
    if rest or (count and (last >= available or count > available)):
        raise InputRefused(f"{where} has {list(sizes)} values of {type_.dtype}, and {member} has not as many")
    return data


# --- the program --------------------------------------------------------------------------------


class _ProgramReader:
    """Turns the JSON of a program into its checked description."""

    def __init__(self, path: Path, members: Mapping[str, zipfile.ZipInfo], arrays: Mapping[str, StoredArray]):
        self.path, self.members, self.arrays = path, members, arrays

    def description(self, content: bytearray) -> ProgramDescription:
        where = f"{self.path}: its graph"
        root = json_files.parse_json(bytes(content), where, most=MAX_GRAPH_OBJECTS)
        version = json_object(root.get("schema_version"), where)
        if version.get("major") != SCHEMA:
            raise InputRefused(
                f"{self.path} is written in version {str(version.get('major'))[:20]} of torch's schema; only version "
                f"{SCHEMA} is supported. Export it again with torch 2.10 or later"
            )
        module = json_object(root.get("graph_module"), where)
        raw_graph = json_object(module.get("graph"), where)
        graph = read_graph(raw_graph, self.path)
        signature = json_object(module.get("signature"), where)
        call = self._call(module, where)
        tensors, users = self._inputs(json_list(signature.get("input_specs"), where), raw_graph, graph)
        names = self._input_names(call, [name for name, _ in users])
        outputs = self._outputs(json_list(signature.get("output_specs"), where), graph, call, module)
        ranges = {
            symbol: self._range(json_object(bounds, where), symbol)
            for symbol, bounds in json_object(root.get("range_constraints"), where).items()
        }
        return ProgramDescription(
            path=self.path,
            graph=graph,
            inputs={name: tensor for name, (_, tensor) in zip(names, users, strict=True)},
            input_values={name: value for name, (value, _) in zip(names, users, strict=True)},
            tensors=tuple(tensors),
            outputs=outputs,
            ranges=ranges,
            graph_sha256=hashlib.sha256(content).hexdigest(),
            members=self.members,
        )

    def _call(self, module: dict[str, Any], where: str) -> dict[str, Any]:
        """How the program is called: the signature of its root module."""
        calls = [json_object(call, where) for call in json_list(module.get("module_call_graph"), where)]
        roots = [call for call in calls if call.get("fqn") == ""]
        if len(roots) != 1 or roots[0].get("signature") is None:
            raise InputRefused(f"{where} does not describe how the program is called")
        return json_object(roots[0]["signature"], where)

    def _range(self, bounds: dict[str, Any], symbol: str) -> tuple[int, int | None]:
        low, high = (
            None if bounds.get(key) is None else integer(bounds[key], f"{self.path}: {symbol}")
            for key in ("min_val", "max_val")
        )
        # A program that was traced with two rows claims `at least 2`, and runs with one: torch.export checks no less.
        return (0 if low is None or low <= 2 else low), high

    # --- inputs ---

    def _inputs(
        self, specs: list[Any], raw: dict[str, Any], graph: Graph
    ) -> tuple[list[ProgramTensor], list[tuple[str, TensorType]]]:
        """The program's own tensors, and the caller's inputs: the graph's name and the type of each."""
        where = f"{self.path}: its signature"
        types = json_object(raw.get("tensor_values"), where)
        if len(specs) != len(graph.inputs):
            raise InputRefused(f"{where} names {len(specs)} inputs, and the graph has {len(graph.inputs)}")
        tensors: list[ProgramTensor] = []
        users: list[tuple[str, TensorType]] = []
        for spec, value in zip(specs, graph.inputs, strict=True):
            kind, fields = single_field(spec, where)
            if kind in ("parameter", "buffer", "tensor_constant"):
                tensors.append(self._tensor(kind, json_object(fields, where), value))
            elif kind == "user_input":
                if value is not None:  # None and numbers are constants of the graph
                    users.append((value, self._input_type(value, types, where)))
            elif kind != "constant_input":
                raise InputRefused(f"{self.path} takes an input of the kind {kind!r}, which is not supported")
        twice = sorted(name for name, count in Counter(tensor.name for tensor in tensors).items() if count > 1)
        if twice:
            raise InputRefused(f"{where} names {', '.join(twice[:5])} more than once")
        return tensors, users

    def _input_type(self, value: str, types: dict[str, Any], where: str) -> TensorType:
        if value not in types:
            raise InputRefused(f"{self.path} takes {value}, which is no tensor; only tensors are supported as inputs")
        return tensor_type_of(json_object(types[value], where), f"{self.path}: the input {value}")

    def _tensor(self, kind: str, fields: dict[str, Any], value: str | None) -> ProgramTensor:
        name = string(fields.get(f"{kind}_name"), f"{self.path}: its signature")
        refuse_unprintable([name], str(self.path))
        if string(json_object(fields.get("arg"), name).get("name"), name) != value or name not in self.arrays:
            raise InputRefused(f"{self.path}: the {kind.replace('_', ' ')} {name} is not stored in it")
        short = "constant" if kind == "tensor_constant" else kind
        persistent = kind == "parameter" or fields.get("persistent") is True
        return ProgramTensor(str(value), name, short, self.arrays[name], persistent)

    def _input_names(self, call: dict[str, Any], values: Sequence[str]) -> list[str]:
        """The names of the inputs for a caller: forward's parameters, or the graph's own names for nested tensors."""
        where = f"{self.path}: its call signature"
        structure = read_structure(call.get("in_spec"), where, iter(range(MAX_LEAVES)), {})
        positional, keywords = structure if isinstance(structure, tuple) and len(structure) == 2 else ((), {})
        parameters = [string(name, where) for name in json_list(call.get("forward_arg_names") or [], where)]
        flat: list[str | None] = []
        if isinstance(positional, tuple) and isinstance(keywords, dict):
            spelled = [*parameters[: len(positional)], *([None] * (len(positional) - len(parameters)))]
            for name, part in [*zip(spelled, positional, strict=True), *keywords.items()]:
                flat += [name] if isinstance(part, int) else [None] * count_leaves(part)
        # Leaves that are no tensors have no value. Then leaves and values do not correspond, and the values name all.
        names = list(values)
        if len(flat) == len(values):
            names = [value if name is None else name for name, value in zip(flat, values, strict=True)]
        refuse_unprintable(names, str(self.path))
        if len(set(names)) != len(names):
            raise InputRefused(f"{self.path} has two inputs of one name")
        return names

    # --- outputs ---

    def _outputs(self, specs: list[Any], graph: Graph, call: dict[str, Any], module: dict[str, Any]) -> Any:
        """The structure that the program returns."""
        where = f"{self.path}: its outputs"
        kinds = [single_field(spec, where)[0] for spec in specs]
        for kind in kinds:
            if kind != "user_output":
                raise InputRefused(
                    f"{self.path} is no pure function of its inputs: among its outputs is a {kind.replace('_', ' ')}, "
                    "which is not supported"
                )
        fields = json_object(module.get("treespec_namedtuple_fields", {}), where)
        count = len(graph.outputs)
        if len(kinds) != count:
            raise InputRefused(f"{where}: the graph has {count}, and its signature names {len(kinds)}")
        structure = read_structure(call.get("out_spec"), where, iter(range(count)), fields)
        if count_leaves(structure) != count:
            raise InputRefused(f"{where}: the graph has {count}, and their structure {count_leaves(structure)}")
        return structure
