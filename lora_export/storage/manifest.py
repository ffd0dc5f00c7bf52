"""The manifest in an output folder: what the output was made from, and the hash of each of its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lora_export.errors import InputRefused
from lora_export.storage.hashes import ALGORITHMS, file_hash, file_sha256
from lora_export.storage.json_files import read_json, write_json

MANIFEST = "lora_export.json"
SIGNATURE = "model.sig"  # where OpenSSF's Model Signing looks for the signature of a folder
SIGNATURE_SUFFIX = ".sig"  # of the signature of a file, after the file's name
OF_THE_OUTPUT = {MANIFEST, SIGNATURE}  # files that say of one folder what it is: copied nowhere, compared with none


def write_manifest(
    folder: Path, facts: Mapping[str, Any], hashes: Mapping[str, Mapping[str, str]] = MappingProxyType({})
) -> None:
    """Write `facts` about a folder's contents, and each file's size and hash. Call it last.

    `hashes` holds known hashes by file name ({"sha256": "ba78..."}). The other files are read.
    """
    contents = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            contents[name] = {"bytes": path.stat().st_size, **(hashes.get(name) or {"sha256": file_sha256(path)})}
    write_json(folder / MANIFEST, {**facts, "files": contents})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read what `write_manifest` wrote; empty where there is no manifest. Raises InputRefused for a damaged one."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    manifest = read_json(path)
    if not isinstance(manifest.get("files", {}), dict):
        raise InputRefused(f"{path} is not a manifest")
    return manifest


def damage(folder: Path) -> list[str]:
    """Compare a folder with its manifest. Returns a line for each file that differs; reads every file named in it.

    Raises InputRefused where there is no manifest, where it records no known hash of a file, and where it names a file
    outside the folder, which is not read.
    """
    recorded = read_manifest(folder).get("files")
    if not recorded:
        raise InputRefused(f"{folder} has no {MANIFEST} to compare it with")
    found = []
    for name, facts in recorded.items():
        known = [key for key in ALGORITHMS if isinstance(facts, dict) and key in facts]
        if not known:
            raise InputRefused(f"{folder / MANIFEST} records no hash of {name} that this version knows")
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise InputRefused(f"{folder / MANIFEST} names {name!r}, which is outside the folder")
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != facts.get("bytes"):
            found.append(f"{name} has {path.stat().st_size} bytes, {facts.get('bytes')} were written")
        elif not is_recorded(path, facts):
            found.append(f"{name} contains other bytes than were written")
    return found


def is_recorded(path: Path, facts: Any) -> bool:
    """Whether a file has the hashes that a manifest records of it. False where that has none. Reads the file."""
    known = [key for key in ALGORITHMS if isinstance(facts, dict) and key in facts]
    return bool(known) and all(file_hash(path, key) == facts[key] for key in known)
