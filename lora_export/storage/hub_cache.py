"""Models and adapters of the Hugging Face Hub by their names, in the local cache, or downloaded into it.

`owner/name` or `owner/name@revision` is looked up by huggingface_hub itself, which follows HF_HOME and HF_HUB_CACHE.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from lora_export.errors import InputRefused, one_line
from lora_export.options.spelling import named
from lora_export.storage import hub_download

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)  # owner/name
WITH_REVISION = re.compile(rf"(?P<name>{HUB_NAME.pattern})(@(?P<revision>[\w./-]+))?", re.ASCII)
# A missing file of these kinds is a missing file.
FILES = {".bin", ".json", ".npz", ".onnx", ".onnx_adapter", ".ort", ".pt", ".pt2", ".pth", ".py", ".safetensors", ".ts"}
CACHED = "models--"  # a model's folder in the cache: models--owner--name
SNAPSHOTS = "snapshots"  # the folder in it that has one for each commit


def locate(source: str | Path, on_message: Callable[[str], None], download: bool = False) -> Path:
    """The path itself; or, where nothing is there and it is a name of the Hub, its snapshot in the cache.

    `on_message` receives a line that names the snapshot. With `download`, a snapshot that the cache lacks is
    downloaded into it (see `hub_download.download`). Else InputRefused is raised, with the command that downloads it.
    """
    text = str(source)
    match = WITH_REVISION.fullmatch(text)
    if match is None or os.path.lexists(text) or Path(text).suffix in FILES:
        return Path(source)
    name, revision = match["name"], match["revision"]
    snapshot = _snapshot(name, revision)
    if snapshot is None and download:
        snapshot = hub_download.download(name, revision, on_message)
    if snapshot is not None:
        on_message(f"{text}: the snapshot {snapshot.name} in the Hugging Face cache")
        return snapshot
    raise InputRefused(
        f"there is no file or folder {one_line(text)}, and the Hugging Face cache has no snapshot of that name. "
        f"To download it, add {named('download', True)}, or use: {hub_download.full_download(name, revision)}"
    )


def hub_name(path: Path) -> str | None:
    """The name on the Hub of what is stored in a cache; None for every other path."""
    folders = path.absolute().parts
    names = (part.removeprefix(CACHED).replace("--", "/", 1) for part in folders if part.startswith(CACHED))
    return next(names, None)


def hub_source(path: Path) -> dict[str, str]:
    """Repository and commit of what is stored in a snapshot of a cache; empty for every other path."""
    folders = path.absolute().parts
    for number, folder in enumerate(folders[:-2]):
        if folder.startswith(CACHED) and folders[number + 1] == SNAPSHOTS:
            return {"repository": folder.removeprefix(CACHED).replace("--", "/", 1), "revision": folders[number + 2]}
    return {}


def _snapshot(name: str, revision: str | None) -> Path | None:
    """The folder of a snapshot; None where there is none, or no huggingface_hub, which makes the cache."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError:
        return None
    try:
        found = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            local_files_only=True,
            allow_patterns=list(hub_download.WANTED),  # a snapshot without the other files is complete
            ignore_patterns=list(hub_download.UNWANTED),
        )
    except (LocalEntryNotFoundError, ValueError):  # ValueError: no name of the Hub
        return None
    return Path(found)
