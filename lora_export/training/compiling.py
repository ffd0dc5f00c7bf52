"""How the steps of a training are computed: the dtype that they multiply in, and torch.compile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lora_export.errors import EnvironmentLacking
from lora_export.layers.torch_internals import compiler_errors
from lora_export.models.tracing import innermost_cause
from lora_export.options.spelling import named
from lora_export.options.train import Precision

AUTOCAST_DTYPES: dict[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}


def refuse_without_compiler(device: str) -> None:
    """Compile a function of one tensor. Raises EnvironmentLacking where this machine cannot: it has no C++ compiler."""
    with _explained("any function"):
        torch.compile(lambda x: 2 * x)(torch.ones(2, device=device))


def compiled(module: nn.Module) -> Any:
    """A callable like `module`, with its parameters. It is compiled when it is first called, and for new shapes."""
    made = torch.compile(module)

    def forward(**inputs: Any) -> Any:
        with _explained(type(module).__name__):
            return made(**inputs)

    return forward


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except compiler_errors() as error:
        raise EnvironmentLacking(
            f"torch.compile cannot compile {what} here: {innermost_cause(error)}. Train without "
            f"{named('compile', True)}"
        ) from error


def autocast(device: str | torch.device, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """PyTorch's autocast on a device in this precision; with "no", a context that does nothing."""
    if precision == "no":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, AUTOCAST_DTYPES[precision])
