"""The files that hold an adapter's tensors: safetensors, and pickles of PyTorch where the user allows them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.options.reading import ReadOptions
from lora_export.options.spelling import named
from lora_export.storage import input_files, safetensors_file, torch_pickle
from lora_export.storage.safetensors_file import Entry

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".lora")  # ends of the names that trainers give to pickles


class TensorSource(Protocol):
    """Tensors by name."""

    @property
    def path(self) -> Path: ...
    @property
    def entries(self) -> Mapping[str, Entry]: ...
    @property
    def metadata(self) -> Mapping[str, str]: ...
    def read(self, name: str) -> NDArray[Any]:
        """One tensor, as stored."""

    def unchanged(self) -> bool:
        """Whether the file is still the one whose names were read."""


def is_pickle(path: Path) -> bool:
    """Whether the name of a file is one that trainers give to pickles."""
    return path.suffix in PICKLES


def open_tensors(path: Path, options: ReadOptions) -> TensorSource:
    """Open a file of tensors. Raises InputRefused for a pickle that the user did not allow, and for a damaged file."""
    if safetensors_file.is_safetensors(path):
        return safetensors_file.open_file(path)
    if not options.allow_pickle:
        raise InputRefused(
            f"{path} is a pickle, which can run code when it is opened. {named('allow_pickle', True)} reads it by "
            "torch.load with weights_only=True, which reads tensors alone"
        )
    return torch_pickle.open_pickle(path)


def names_in(path: Path) -> frozenset[str]:
    """The names of a file's tensors, for recognition; those of a pickle with other texts. Raises nothing.

    Reads headers only, and unpickles nothing.
    """
    if safetensors_file.is_safetensors(path):
        try:
            return frozenset(safetensors_file.open_file(path).entries)
        except (InputRefused, OSError):
            return frozenset()
    return torch_pickle.text_in_pickle(path) if is_pickle(path) else frozenset()


def hash_of_unchanged(file: TensorSource, *beside: Path) -> str:
    """The SHA-256 of an adapter's files, the tensors' last. Raises InputRefused where that one changed meanwhile."""
    sha256 = hash_of_files([*beside, file.path])
    if not file.unchanged():
        raise InputRefused(f"{file.path} changed while it was being read")
    return sha256


def hash_of_files(paths: Iterable[Path]) -> str:
    """The SHA-256 of files, one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with input_files.open_regular(path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
