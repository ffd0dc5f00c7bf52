"""The file of a residual: a zip archive of facts, headers, small files, and the differences of each weight file.

It is untrusted input. Members are read as streams, and no more of them than their reader asks for.
"""

from __future__ import annotations

import contextlib
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from lora_export.errors import InputRefused
from lora_export.isolation.limits import MAX_HEADER, MAX_JSON
from lora_export.options.spelling import named
from lora_export.storage import input_files, json_files

FACTS = "residual.json"
FORMAT = 1
LEVEL = 6  # of zlib; what it compresses is small already
# What zipfile raises: RuntimeError for an encrypted member, NotImplementedError for other ways of compression.
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError, IndexError, struct.error)
FACT_KINDS = {"format": int, "hashing": str, "adapters": list, "settings": dict, "shards": dict, "files": dict}


class _InOrder:
    """What zipfile needs to write without going back, as in a store: one residual has the same bytes everywhere."""

    def __init__(self, file: IO[bytes]):
        self.write, self.flush, self.close = file.write, file.flush, file.close


class ResidualWriter:
    """Writes the members of a new archive, one after another, from its first byte to its last."""

    def __init__(self, path: Path):
        self._files = contextlib.ExitStack()
        file = self._files.enter_context(path.open("xb"))
        self._zip = self._files.enter_context(
            zipfile.ZipFile(_InOrder(file), "w", zipfile.ZIP_DEFLATED, compresslevel=LEVEL)
        )

    def __enter__(self) -> ResidualWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._files.__exit__(*error)

    @contextlib.contextmanager
    def member(self, name: str) -> Iterator[Callable[[bytes], object]]:
        """Yield a function that appends bytes to a member."""
        with self._zip.open(self._info(name), "w", force_zip64=True) as stream:
            yield stream.write

    def write(self, name: str, data: bytes) -> None:
        self._zip.writestr(self._info(name), data, compresslevel=LEVEL)

    @staticmethod
    def _info(name: str) -> zipfile.ZipInfo:
        info = zipfile.ZipInfo(name)  # without the time: the same residual has the same bytes
        info.compress_type = zipfile.ZIP_DEFLATED
        return info


class Residual:
    """An archive that was checked as far as that is possible without reading the differences."""

    def __init__(self, path: Path, archive: zipfile.ZipFile):
        self.path, self._zip = path, archive
        self.facts = self._read_facts()

    def _read_facts(self) -> Mapping[str, Any]:
        facts = json_files.parse_json(self.read(FACTS, MAX_JSON), f"{FACTS} in {self.path}")
        if facts.get("format") != FORMAT:
            raise InputRefused(
                f"{self.path} is a residual of format {facts.get('format')!r}, made by {facts.get('made_by')}; this "
                f"version reads format {FORMAT}"
            )
        wrong = [key for key, kind in FACT_KINDS.items() if not isinstance(facts.get(key), kind)]
        if not wrong and not all(isinstance(of_file, dict) for of_file in facts["files"].values()):
            wrong = ["files"]
        if wrong:
            raise InputRefused(f"{self.path} is damaged: {FACTS} has no {' and no '.join(wrong)}")
        return facts

    def read(self, name: str, most: int = MAX_JSON) -> bytes:
        """A whole member. Raises InputRefused where it is missing, damaged or larger than `most`."""
        with self.stream(name) as read_up_to:
            data = read_up_to(most + 1)
        if len(data) > most:
            raise InputRefused(f"{self.path}: {name} has more than {most:,} bytes, which no residual needs")
        return data

    def header(self, shard: int) -> bytes:
        """The first bytes of a weight file of the base: the header and its length."""
        return self.read(f"header/{shard}", MAX_HEADER + 8)

    @contextlib.contextmanager
    def stream(self, name: str) -> Iterator[Callable[[int], bytes]]:
        """Yield a function that reads up to so many bytes of a member. Raises InputRefused as `read`."""
        try:
            member = self._zip.open(name)
        except KeyError as error:
            raise InputRefused(f"{self.path} is damaged: it has no {name}") from error
        except DAMAGED as error:
            raise InputRefused(f"{self.path} is damaged: {name}: {error}") from error
        with member:
            yield lambda count: self._read(member, name, count)

    def _read(self, member: IO[bytes], name: str, count: int) -> bytes:
        try:
            return member.read(count)
        except DAMAGED as error:
            raise InputRefused(f"{self.path} is damaged: {name}: {error}") from error


@contextlib.contextmanager
def open_residual(path: Path) -> Iterator[Residual]:
    """Open a residual. Raises InputRefused for a file that is none, or of another format."""
    with input_files.open_regular(path) as file:
        try:
            archive = zipfile.ZipFile(file)
        except DAMAGED as error:
            raise InputRefused(f"{path} is not a residual of a merge ({named('keep_residual')}): {error}") from error
        with archive:
            yield Residual(path, archive)


def facts_as_bytes(facts: Mapping[str, Any]) -> bytes:
    """The facts of a residual as they are stored."""
    return json.dumps({"format": FORMAT, **facts}, indent=1, sort_keys=True).encode()
