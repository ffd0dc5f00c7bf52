"""Read the record that lora-export stores in what it writes: base, adapters, settings, verdict. Nothing is run."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_export import provenance
from lora_export.errors import InputRefused
from lora_export.formats.onnx_adapter import ROW_ADAPTERS_KEY
from lora_export.provenance import History
from lora_export.storage import json_files, safetensors_file
from lora_export.storage.manifest import MANIFEST, read_manifest

MAX_RECORD = 10_000_000  # bytes of the record in a TorchScript archive


@dataclass(frozen=True)
class WrittenRecord:
    """What a file or folder records about how it was made. False where it records nothing."""

    content: Mapping[str, Any] = field(default_factory=dict)
    adapters: History = ()  # all of them, those of earlier merges first
    by_row: Sequence[str] | None = None  # the names that rows may choose from, from id 1 on; None: not by row

    def __bool__(self) -> bool:
        return bool(self.content)

    @property
    def mode(self) -> str:
        """`merged`, `nodes`, `inputs` or `rows`."""
        return str(self.settings.get("lora", "merged"))

    @property
    def settings(self) -> Mapping[str, Any]:
        return _table(self.content, "settings")

    @property
    def base(self) -> Mapping[str, Any]:
        """Hashes of the base: {"sha256": of all weights of a PyTorch model}, or {file name: {algorithm: hash}}."""
        return _table(self.content, "base")


def record_of_folder(path: Path) -> WrittenRecord:
    """What the manifest of a folder records."""
    return _record(read_manifest(path), path)


def record_of_weights(path: Path) -> WrittenRecord:
    """What the header of a .safetensors file records."""
    return _parsed(safetensors_file.open_file(path).metadata.get(provenance.KEY), path)


def record_of_archive(path: Path) -> WrittenRecord:
    """What a TorchScript file or a program records; an empty record for what is no archive."""
    return _parsed(_text_in_archive(path), path) if zipfile.is_zipfile(path) else WrittenRecord()


def record_of_graph(metadata: Mapping[str, str], path: Path) -> WrittenRecord:
    """What the metadata of a graph record."""
    found = _parsed(metadata.get(provenance.KEY), path)
    text = metadata.get(ROW_ADAPTERS_KEY)
    if text is None:
        return found
    names = json_files.parse_json(text.encode(errors="surrogatepass"), path).get("adapters", [])
    return WrittenRecord(found.content, found.adapters, [str(name) for name in names])


def _text_in_archive(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.filename.endswith(f"/extra/{MANIFEST}"):
                if member.file_size > MAX_RECORD:
                    raise InputRefused(f"{path}: the record has {member.file_size:,} bytes, which no record needs")
                return archive.read(member).decode(errors="replace")
    return None


def _parsed(text: str | None, path: Path) -> WrittenRecord:
    if not text:
        return WrittenRecord()
    return _record(json_files.parse_json(text.encode(errors="surrogatepass"), f"the record in {path}"), path)


def _record(content: Mapping[str, Any], path: Path) -> WrittenRecord:
    return WrittenRecord(content, provenance.history(content, path))


def _table(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = content.get(key)
    return value if isinstance(value, Mapping) else {}
