"""A program of torch.export with dynamic sizes, which `torch.export.load` reads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from torch import nn

from lora_export.models import export_program
from lora_export.models.model import Model
from lora_export.options.export import TorchScriptOptions
from lora_export.runtime.torch_runners import ModuleRunner

IS_TRACE, RUNTIME = False, "PyTorch"


def writer(base: Model, module: nn.Module, _: TorchScriptOptions) -> Callable[..., None]:
    program = export_program.to_program(module, base.example_inputs(), axes=base.axes)
    return functools.partial(export_program.save_program, program)


def runner_of_file(path: Path, base: Model) -> ModuleRunner:
    axes = {
        name: tuple(None if axis in base.axes[name] else size for axis, size in enumerate(value.shape))
        for name, value in base.example_inputs().items()
    }
    module, limits = export_program.load_own_program(path)
    return ModuleRunner(module, axes=axes, limits=limits, path=path)
