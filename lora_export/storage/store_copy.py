"""Copies on the disk of objects in a store, for libraries that open files of the disk alone."""

from __future__ import annotations

import atexit
import hashlib
import json
import shutil
from pathlib import Path

from lora_export.callbacks import OnMessage
from lora_export.errors import count
from lora_export.storage.atomic_output import byte_size, refuse_lack_of_space
from lora_export.storage.input_files import copy_file, must_exist
from lora_export.storage.store_path import StorePath

_copies: dict[str, Path] = {}  # by the hash of names, sizes and ETags; removed when the process ends


def on_disk(path: Path, on_message: OnMessage, what: str = "model", *, is_alone: bool = False) -> Path:
    """The path itself; of an address, a copy that is removed when this process ends.

    Unless it is alone, a file brings those beside it whose names begin with its stem: the external data of a graph.
    `on_message` receives a line. Raises InputRefused where there is no such `what`, and OutputFailed where the disk has
    too little space.
    """
    if not isinstance(path, StorePath):
        return path
    must_exist(path, what)
    home = path if path.is_dir() else path.parent
    files = [each for each in home.rglob("*") if each.is_file()]
    if path is not home:
        beside = [each for each in files if each.parent == home and each.name.startswith(path.stem)]
        files = [path] if is_alone else beside
    states = [(str(each), each.stat().st_ino, each.stat().st_size) for each in files]
    size = sum(size for *_, size in states)
    digest = hashlib.sha256(json.dumps(states).encode()).hexdigest()
    if digest not in _copies:
        import tempfile  # most models are on the disk

        folder = Path(tempfile.mkdtemp(prefix="lora-export-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        refuse_lack_of_space(folder, size)
        on_message(f"{path}: {count(len(files), 'file')}, {byte_size(size)} copied to {folder} until this command ends")
        for each in files:
            target = folder / home.name / each.relative_to(home)
            target.parent.mkdir(parents=True, exist_ok=True)
            copy_file(each, target)
        _copies[digest] = folder / home.name
    return _copies[digest] if path is home else _copies[digest] / path.name
