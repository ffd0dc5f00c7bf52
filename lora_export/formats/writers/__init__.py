"""Formats that adapters are written in. Each is one file.

To add the format NAME:

1. Write `formats/writers/NAME.py` with what `AdapterWriter` asks for: SUFFIX and `write`.
2. Add a line to TARGETS.
3. Write `tests/formats/writers/test_NAME.py`.

A writer refuses by name what its format cannot express. It drops nothing, and it rounds no value.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from lora_export.errors import WrongUsage
from lora_export.lora import Adapter
from lora_export.options.reading import DEFAULTS, ReadOptions
from lora_export.plan.diffusion.families import Family

# The name of a format and its module. Modules are imported when an adapter is written.
TARGETS = {
    "peft": "lora_export.formats.writers.peft",
    "mlx": "lora_export.formats.writers.mlx",
    "gguf": "lora_export.formats.writers.gguf",
    "kohya": "lora_export.formats.writers.kohya",
    "comfyui": "lora_export.formats.writers.comfyui",
    "diffusers": "lora_export.formats.writers.diffusers",
}
OF_PIPELINES = frozenset({"kohya", "comfyui", "diffusers"})  # the formats that have several models of a pipeline


@dataclass(frozen=True)
class WriteOptions:
    """How an adapter is written."""

    reading: ReadOptions = DEFAULTS  # how it was read; `base_config` has what some formats need of the base
    family: Family = Family.UNKNOWN  # of the diffusion pipeline, which numbers its text encoders
    stacked_experts: bool = False  # of PEFT's format: one tensor for all experts of a projection, as SGLang reads them


class AdapterWriter(Protocol):
    """What the module of a format provides."""

    SUFFIX: str  # of the file; empty where the output is a folder

    def write(self, adapter: Adapter, path: Path, options: WriteOptions) -> tuple[str, ...]:
        """Write the adapter to a folder that exists, or to a file that does not, both staged by the caller.

        Returns what the user should know. Raises InputRefused with everything that the format cannot express, and
        leaves nothing to clean up but what is in `path`.
        """


def writer_of(target: str) -> AdapterWriter:
    """The writer of a format. Raises WrongUsage for an unknown one."""
    if target not in TARGETS:
        raise WrongUsage(f"--to is {target!r}; it must be one of {', '.join(TARGETS)}")
    return cast(AdapterWriter, importlib.import_module(TARGETS[target]))
