"""Adapter formats. Each is one file, recognised by the contents of the adapter.

To add the format NAME:

1. Write `formats/NAME.py` with what `AdapterFormat` asks for: DESCRIPTION, `recognises` and `read`.
2. Add a line to FORMATS.
3. Write `tests/formats/test_NAME.py`.

The new module returns an `Adapter`: pairs A (rank, in...) and B (out, rank...) with a final scale, under the module
names of the base. What is special about the format (alpha, prefixes, file layout) stays in its file. It refuses what it
does not support, by name, with InputRefused.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Protocol, cast

from lora_export.errors import InputRefused, listed
from lora_export.lora import Adapter
from lora_export.options.reading import DEFAULTS, ReadOptions
from lora_export.storage import input_files
from lora_export.storage.hub_cache import hub_source

# The name of a format and its module. Modules are imported when an adapter is loaded.
FORMATS = {
    "peft": "lora_export.formats.peft",
    "mlx": "lora_export.formats.mlx",
    "loralib": "lora_export.formats.loralib",
    "litgpt": "lora_export.formats.litgpt",
    "torchtune": "lora_export.formats.torchtune",
    "kohya": "lora_export.formats.kohya",
    "comfyui": "lora_export.formats.comfyui",
    "diffusers": "lora_export.formats.diffusers",
}
OF_ONE_FILE = ("kohya", "comfyui", "diffusers")  # formats that are recognised by every key
SHOWN_KEYS = 8
# Names that trainers give to every adapter's file: that of the folder is the adapter's.
SAME_FOR_ALL = frozenset({"adapter_model", "adapters", "lit_model", "pytorch_lora_weights"})


class AdapterFormat(Protocol):
    """What the module of a format provides."""

    DESCRIPTION: str  # what such an adapter consists of, for messages: "a folder with ..."

    def recognises(self, path: Path) -> bool:
        """Whether the adapter at `path` is in this format. Reads headers only, and raises nothing."""

    def read(self, path: Path, name: str, options: ReadOptions) -> Adapter:
        """Read the adapter. Raises InputRefused with everything that is wrong with it."""


class _OneFileFormat(Protocol):
    """What a format of one file provides beside that."""

    def foreign_keys(self, path: Path) -> list[str]:
        """The keys of another format in a file that is in this one otherwise."""


def recognised(path: Path) -> bool:
    """Whether an adapter in a known format is at `path`. Reads no tensors."""
    return any(adapter_format.recognises(path) for adapter_format in _modules(FORMATS).values())


def load(path: str | Path, *, name: str | None = None, options: ReadOptions = DEFAULTS) -> Adapter:
    """Read an adapter in any known format, from its folder or its one file. Runs no code that came with it.

    `name` is the adapter's name in reports and graphs (default: the folder's name, or the file's without its suffix,
    where that is no name like `adapter_model`). `options` state what its files do not record, and choose a format where
    several recognise the adapter. Raises InputRefused for an adapter that is missing, damaged, unknown or not
    supported.
    """
    path = Path(path)
    input_files.must_exist(path, "adapter")
    if options.format and options.format not in FORMATS:
        raise InputRefused(f"unknown adapter format {options.format!r}; known: {', '.join(FORMATS)}")
    candidates = _modules([options.format] if options.format else FORMATS)
    matching = {key: module for key, module in candidates.items() if module.recognises(path)}
    if not matching:
        if options.format:
            _refuse_foreign_keys(path)
            raise InputRefused(
                f"{path} is not in the format {options.format}: {candidates[options.format].DESCRIPTION}"
            )
        _refuse_foreign_keys(path)
        known = [f"{key}: {module.DESCRIPTION}" for key, module in candidates.items()]
        raise InputRefused(f"{path} is not an adapter in a known format:", listed(known, len(known)))
    if len(matching) > 1:
        raise InputRefused(
            f"{path} may be in several formats: {', '.join(matching)}. Choose one: --format {next(iter(matching))}"
        )
    (module,) = matching.values()
    return replace(module.read(path, name or _default_name(path), options), hub=hub_source(path))


def _refuse_foreign_keys(path: Path) -> None:
    """Raise InputRefused for a file of which most keys are in one format, and some are not."""
    for name in OF_ONE_FILE:
        (module,) = _modules([name]).values()
        if foreign := cast(_OneFileFormat, module).foreign_keys(path):
            raise InputRefused(
                f"{path} is in the format {name}, but for {len(foreign)} of its keys:", listed(foreign, SHOWN_KEYS)
            )


def _default_name(path: Path) -> str:
    resolved = path.resolve()
    if resolved.is_dir():
        return resolved.name
    stem = resolved.name.partition(".")[0]
    return resolved.parent.name if stem in SAME_FOR_ALL else stem


def _modules(names: Iterable[str]) -> dict[str, AdapterFormat]:
    return {name: cast(AdapterFormat, importlib.import_module(FORMATS[name])) for name in names}
