"""Formats that adapters are written in. Each is one file.

To add the format NAME, write `formats/writers/NAME.py` with what `AdapterWriter` asks for (SUFFIX and `write`), and
`tests/formats/writers/test_NAME.py`. Every module of this folder that has a SUFFIX is a format.

A writer refuses by name what its format cannot express. It drops nothing, and it rounds no value.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from lora_export.errors import WrongUsage
from lora_export.lora import Adapter
from lora_export.options.reading import DEFAULTS, ReadOptions
from lora_export.options.spelling import named
from lora_export.plan.diffusion import Family


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
    """The writer of a format. Its module is imported then. Raises WrongUsage for an unknown one."""
    writers = _writers()
    if target not in writers:
        raise WrongUsage(f"{named('to')} is {target!r}; it must be one of {', '.join(writers)}")
    return writers[target]


def holds_pipelines(target: str) -> bool:
    """Whether a format has adapters for several models of a pipeline: those of one file for image models."""
    return getattr(_writers().get(target), "OF_PIPELINES", False)


@functools.cache
def _writers() -> Mapping[str, AdapterWriter]:
    modules = {one.name: importlib.import_module(f"{__name__}.{one.name}") for one in pkgutil.iter_modules(__path__)}
    return {name: cast(AdapterWriter, module) for name, module in modules.items() if hasattr(module, "SUFFIX")}
