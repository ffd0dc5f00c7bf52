"""TorchScript: a trace, which `torch.jit.load` reads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lora_export.errors import RuntimeRefused
from lora_export.models import export_program
from lora_export.models.model import Model
from lora_export.models.outputs import named_outputs
from lora_export.models.tracing import cache_setting
from lora_export.options.export import TorchScriptOptions
from lora_export.runtime.torchscript.runner import ScriptRunner

IS_TRACE, RUNTIME = True, "PyTorch"
TRACE_TOLERANCE = 1e-2  # the proof decides; this finds a trace that repeats the layout of its example


def writer(base: Model, module: nn.Module, _: TorchScriptOptions) -> Callable[..., None]:
    script = export_program.to_torchscript(module, base.example_inputs())
    if base.text_only is not None and not follows(script, module, base):
        raise RuntimeRefused("the trace is right for one number and one size of images alone")
    return functools.partial(export_program.save_torchscript, script)


def runner_of_file(path: Path, base: Model) -> ScriptRunner:
    return ScriptRunner(path, base.input_names)


def follows(script: torch.jit.ScriptModule, module: nn.Module, base: Model) -> bool:
    """Whether a trace returns nearly what the module does, for other sizes than it was traced with."""
    inputs = base.inputs(base.checked_sizes({})[0], seed=1)
    with torch.no_grad(), cache_setting(module, to=False):
        wanted = named_outputs(module(**inputs))
        try:
            found = named_outputs(script(**inputs))
        except RuntimeError:
            return False
    return all(
        name in found
        and found[name].shape == value.shape
        and torch.allclose(found[name], value, rtol=TRACE_TOLERANCE, atol=TRACE_TOLERANCE)
        for name, value in wanted.items()
    )
