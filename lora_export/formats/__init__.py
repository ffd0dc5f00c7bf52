"""Adapter formats: one file each, recognised by looking inside.

A format is a module with `recognises(path)` and `read(path, name)`; a new one is a file and a line here.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from lora_export.errors import InputRefused
from lora_export.lora import Adapter
from lora_export.storage import input_files

FORMATS = {
    "peft": "lora_export.formats.peft",
}


def recognised(path: Path) -> bool:
    """Whether this is an adapter of a format that I know. Reads no tensors."""
    return any(importlib.import_module(module).recognises(path) for module in FORMATS.values())


def load(path: str | Path, *, name: str | None = None, format: str | None = None) -> Adapter:
    """Read an adapter, whatever format it came in. Runs no code that came with it.

    `name` is what the adapter is called in reports and graphs (default: the file's or folder's name).
    Raises InputRefused for what is missing, damaged, unknown or not supported.
    """
    path = Path(path)
    input_files.must_exist(path, "adapter")
    if format is not None and format not in FORMATS:
        raise InputRefused(f"unknown adapter format {format!r}; known: {', '.join(FORMATS)}")
    candidates = [format] if format else list(FORMATS)
    modules = [importlib.import_module(FORMATS[candidate]) for candidate in candidates]
    fitting = [module for module in modules if module.recognises(path)]
    if not fitting:
        raise InputRefused(
            f"{path} is no adapter that I know. A PEFT adapter is a folder with adapter_config.json and "
            "adapter_model.safetensors"
        )
    adapter: Adapter = fitting[0].read(path, name or path.resolve().name)
    return adapter
