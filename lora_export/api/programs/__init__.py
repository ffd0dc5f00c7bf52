"""What `torchscript` writes: one module for each format, with the name that the option `format` has for it.

Another format is such a module, its name in that option, and its kind in `storage.artifact_kinds.PROGRAM_FORMATS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, cast

from torch import nn

from lora_export.models.model import Model
from lora_export.options.export import TorchScriptOptions
from lora_export.runtime.runner import Runner


class ProgramFormat(Protocol):
    """What the module of a format provides.

    One that needs a package has `require` too, which raises EnvironmentLacking without it, before any work.
    """

    IS_TRACE: bool  # whether the file may repeat the layout of its example; another has the sizes that it takes
    RUNTIME: str  # what runs the file in its proof, for the record

    def writer(self, base: Model, module: nn.Module, options: TorchScriptOptions) -> Callable[..., None]:
        """How to write a module that takes the inputs of `base`: a function of the path and `extra`, texts by name.

        Raises RuntimeRefused where the module cannot be exported.
        """

    def runner_of_file(self, path: Path, base: Model) -> Runner:
        """The file that was written, as its users load it."""


def program_format(name: str) -> ProgramFormat:
    """The module of a format."""
    return cast(ProgramFormat, importlib.import_module(f"{__name__}.{name}"))
