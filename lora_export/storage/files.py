"""What files hold: hashes, manifests and JSON, read within bounds; and which of them are files at all."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from xxhash import xxh3_128

from lora_export.errors import InputRefused, one_line

# XXH3 (https://xxhash.com) sees every accident, at the speed of memory. SHA-256 is what sha256sum and model hubs
# show, and what a signature should stand on; on a large model it costs more than the merge.
HASHES: dict[str, Callable[[], Hash]] = {"xxh3_128": xxh3_128, "sha256": hashlib.sha256}
MAX_JSON = 100_000_000  # bytes; the index of the largest models has a tenth
MAX_OBJECTS = 250_000  # in one file; a header has one for each tensor, and each takes a hundred times its bytes here
MAX_DEPTH = 100  # of objects and lists in each other; what walks through them later may recurse


class Hash(Protocol):
    """What hashlib and xxhash have in common."""

    def update(self, data: Any, /) -> None: ...
    def hexdigest(self) -> str: ...


def shown(name: str | Path) -> str:
    """A name within a line of text."""
    return one_line(str(name))


def hash_of(path: Path, name: str) -> str:
    """The hash of a file's bytes, by one of HASHES, as hex."""
    value = HASHES[name]()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            value.update(part)
    return value.hexdigest()


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hex."""
    return hash_of(path, "sha256")


def parse_json(text: bytes, source: Path | str, *, most: int = MAX_OBJECTS) -> dict[str, Any]:
    """A JSON object from a file that nobody vouches for.

    Raises InputRefused, naming `source`, for what is not JSON, not an object, nested deeply, of more than `most`
    objects, or names a key twice (Python would silently take the last one).
    """
    objects = itertools.count(1)

    def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if next(objects) > most:
            raise InputRefused(f"{source} holds more than {most:,} objects, which no such file needs")
        table = dict(pairs)
        if len(table) != len(pairs):
            twins = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise InputRefused(f"{source} names {', '.join(twins)} more than once")
        return table

    try:
        content = json.loads(text, object_pairs_hook=without_twins)
    except (ValueError, RecursionError) as error:
        raise InputRefused(f"{source} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputRefused(f"{source} is not a JSON object")
    if _is_deep(content):
        raise InputRefused(f"{source} nests objects and lists more than {MAX_DEPTH} deep")
    return content


def _is_deep(content: Any) -> bool:
    level = [content]
    for _ in range(MAX_DEPTH):
        inner = (there.values() if isinstance(there, dict) else there for there in level)
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
        if not level:
            return False
    return True


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InputRefused as `parse_json` and `open_regular` do, and for a huge file."""
    with open_regular(path) as file:
        text = file.read(MAX_JSON + 1)
    if len(text) > MAX_JSON:
        raise InputRefused(f"{path} has more than {MAX_JSON:,} bytes, which no such file needs")
    return parse_json(text, path)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_flat(value: Any) -> bool:
    return isinstance(value, dict) and not any(isinstance(inner, dict | list) for inner in value.values())


_ACTED_UPON: dict[str, tuple[Callable[[Any], bool], str]] = {
    "architectures": (_are_names, "a list of names"),
    "id2label": (_is_flat, "a table of names"),
    "label2id": (_is_flat, "a table of numbers"),
    "problem_type": (lambda value: isinstance(value, str), "a name"),
}


def read_model_config(path: Path) -> dict[str, Any]:
    """A model's `config.json`. Raises InputRefused where a field that is acted upon is not what transformers writes."""
    config = read_json(path)
    for field, (fits, what) in _ACTED_UPON.items():
        if config.get(field) is not None and not fits(config[field]):
            raise InputRefused(f"{path}: {field} is {config[field]!r}; it must be {what}")
    return config


def must_exist(path: Path, what: str) -> None:
    """Raises InputRefused where there is nothing at an input's path, or it cannot be looked at."""
    try:
        path.stat()
    except FileNotFoundError:
        raise InputRefused(f"there is no {what} at {path}") from None
    except OSError as error:
        raise InputRefused(f"{path}: {error.strerror}") from error


def must_be_regular(path: Path) -> None:
    """Raises InputRefused as `open_regular` does: for a file that a library is going to open by its name."""
    open_regular(path).close()


def open_regular(path: Path) -> BinaryIO:
    """Open an input for reading. Raises InputRefused for one that cannot be opened, or is no regular file."""
    try:
        # Non-blocking, so that a FIFO is refused at once instead of waiting for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise InputRefused(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputRefused(f"{path} is not a regular file")
    return os.fdopen(descriptor, "rb")


def regular_files(folder: Path) -> list[Path]:
    """Every file below a folder, links to files (as in a Hugging Face cache) included, FIFOs and devices not."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
