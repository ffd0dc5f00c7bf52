"""JSON files: read within bounds, since others wrote them; written with the same bytes on every system."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lora_export.errors import InputRefused
from lora_export.isolation.limits import MAX_DEPTH, MAX_JSON, MAX_OBJECTS, MAX_VALUES
from lora_export.storage.input_files import read_bytes


def parse_json(text: bytes | str, source: Path | str, *, most: int = MAX_OBJECTS) -> dict[str, Any]:
    """Parse a JSON object from an untrusted source. A text from another JSON may have halves of surrogate pairs.

    Raises InputRefused, which names `source`, for text that is not JSON, is not an object, nests deeper than MAX_DEPTH,
    contains more than `most` objects, or names a key twice (Python would silently take the last one).
    """
    text = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    refuse_flood(text, source)
    try:
        content = json.loads(text, object_pairs_hook=checked_objects(source, most))
    except (ValueError, RecursionError) as error:
        raise InputRefused(f"{source} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputRefused(f"{source} is not a JSON object")
    if _is_deep(content):
        raise InputRefused(f"{source} nests objects and lists more than {MAX_DEPTH} deep")
    return content


def refuse_flood(text: bytes, source: Path | str) -> None:
    """Raise InputRefused for a JSON text with so many commas and lists that a parser would take gigabytes."""
    if text.count(b",") + text.count(b"[") > MAX_VALUES:
        raise InputRefused(f"{source} contains more than {MAX_VALUES:,} values and lists, which no such file needs")


def checked_objects(source: Path | str, most: int = MAX_OBJECTS) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """What makes tables of the objects of one text. It raises InputRefused as `parse_json`."""
    objects = itertools.count(1)

    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if next(objects) > most:
            raise InputRefused(f"{source} contains more than {most:,} objects, which no such file needs")
        table = dict(pairs)
        if len(table) != len(pairs):
            duplicates = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise InputRefused(f"{source} names {', '.join(duplicates)} more than once")
        return table

    return made


def _is_deep(content: Any) -> bool:
    level = [content]
    for _ in range(MAX_DEPTH):
        members = (container.values() if isinstance(container, dict) else container for container in level)
        level = [value for values in members for value in values if isinstance(value, dict | list)]
        if not level:
            return False
    return True


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file. Raises InputRefused as `parse_json` and `open_regular` do, and above MAX_JSON."""
    return parse_json(read_bytes(path, MAX_JSON), path)


def write_json(path: Path, content: Mapping[str, Any], *, sort_keys: bool = False) -> None:
    """Write a JSON object, indented, in UTF-8. Lines end with a line feed on Windows, too."""
    path.write_text(json.dumps(content, indent=2, sort_keys=sort_keys) + "\n", encoding="utf-8", newline="\n")


def _is_flat(value: Any) -> bool:
    return isinstance(value, dict) and not any(isinstance(inner, dict | list) for inner in value.values())


# Fields of a model's config that this program uses, a check of each, and what it must be.
_USED_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "architectures": (lambda value: isinstance(value, list) and {*map(type, value)} <= {str}, "a list of names"),
    "id2label": (_is_flat, "a table of names"),
    "label2id": (_is_flat, "a table of numbers"),
    "num_labels": (lambda value: type(value) is int, "a number"),
    "problem_type": (lambda value: isinstance(value, str), "a name"),
}


def read_model_config(path: Path) -> dict[str, Any]:
    """Read a model's `config.json`. Raises InputRefused where a used field has an unexpected type."""
    config = read_json(path)
    for field, (fits, what) in _USED_FIELDS.items():
        if config.get(field) is not None and not fits(config[field]):
            raise InputRefused(f"{path}: {field} is {config[field]!r}; it must be {what}")
    return config
