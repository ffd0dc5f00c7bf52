"""Nested containers of a program's inputs and outputs (torch's pytrees): read from JSON, counted and filled."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_export.errors import InputRefused, refuse_unprintable
from lora_export.models.pt2.json_fields import json_list, json_object, string
from lora_export.storage import json_files

SEQUENCES = {"builtins.tuple": tuple, "builtins.list": list, "collections.deque": list}
MAPPINGS = ("builtins.dict", "collections.OrderedDict")
TRANSFORMERS = "transformers."  # its ModelOutputs are read as dicts; the type is not imported


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
    if isinstance(structure, dict):
        structure = structure.values()
    elif not isinstance(structure, tuple | list):
        return 1
    return functools.reduce(lambda count, part: count + count_leaves(part), structure, 0)


def fill(structure: Any, results: Sequence[Any]) -> Any:
    """The structure with `results[position]` in place of each position."""
    if isinstance(structure, dict):
        return {key: fill(part, results) for key, part in structure.items()}
    if isinstance(structure, tuple | list):
        return type(structure)(fill(part, results) for part in structure)
    return results[structure]
