"""The kind of a path.

A folder's kind is decided by what it contains. A file's name claims its kind, and the reader of this kind refuses other
content by what is wrong with it. Where the name claims none, the content decides.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from lora_export.artifacts.files import graphs_in
from lora_export.errors import InputRefused
from lora_export.options.common import is_address
from lora_export.options.spelling import command
from lora_export.storage import input_files
from lora_export.storage.artifact_kinds import ArtifactKind, claimed_kind
from lora_export.storage.store_path import StorePath
from lora_export.weights.weight_files import MODULES_FILE, PIPELINE_INDEX

MODEL_FORMS = ("a Hugging Face folder that exists", "`package.module:factory`", "`file.py:factory`")
# A member of each kind of archive, in the archive's one folder
MEMBERS = {"archive_format": ArtifactKind.PROGRAM, "constants.pkl": ArtifactKind.SCRIPT}


def artifact_kind(path: Path) -> ArtifactKind:
    """The kind of a path, which need not exist. Reads no weights."""
    if path.is_dir():
        if graphs_in(path):
            return ArtifactKind.GENERATION
        if (path / PIPELINE_INDEX).is_file():
            return ArtifactKind.PIPELINE
        return ArtifactKind.EMBEDDER if (path / MODULES_FILE).is_file() else ArtifactKind.CHECKPOINT
    return claimed_kind(path) or _kind_of_content(path)


def is_arrays(path: Path) -> bool:
    """Whether a file is taken for arrays of NumPy (.npz)."""
    return path.suffix.lower() == ".npz"


def _kind_of_content(path: Path) -> ArtifactKind:
    import zipfile  # few names claim no kind

    from lora_export.artifacts import archive
    from lora_export.storage.gguf_file import is_gguf

    if is_gguf(path):  # as programs that download models store them
        return ArtifactKind.GGUF
    names: set[str] = set()
    # A program is on the disk: what is in a store is not opened by name.
    if not isinstance(path, StorePath) and path.is_file() and zipfile.is_zipfile(path):
        with contextlib.suppress(InputRefused), archive.opened(path) as opened:
            names = {name.partition("/")[2] for name in opened.namelist()}
    return next((kind for member, kind in MEMBERS.items() if member in names), ArtifactKind.OTHER)


def refuse_no_model(source: str | Path, file: str = "") -> None:
    """Raise InputRefused for what names no model of PyTorch. What it names may still be missing or damaged inside.

    This is for before anything is read: what else a command reads may take long. `file` is what the command accepts
    beside folders and factories.
    """
    location, _, attribute = str(source).rpartition(":")
    is_factory = bool(location and attribute) and not is_address(source)
    kind = artifact_kind(Path(source))
    if kind is ArtifactKind.GGUF:
        its_own = command("verify", "MERGED.gguf", model="BASE.gguf")
        raise InputRefused(
            f"{source} is a GGUF file, which PyTorch does not run. Give the Hugging Face folder that it was made from. "
            f"`{its_own}` compares two GGUF files"
        )
    if not (Path(source).is_dir() or kind is ArtifactKind.PROGRAM or is_factory):
        input_files.refuse_broken_link(Path(source))
        *others, last = (*MODEL_FORMS, file) if file else MODEL_FORMS
        similar = input_files.similar_name(Path(source))
        raise InputRefused(f"{str(source)!r} is no model: give {', '.join(others)} or {last}{similar}")
