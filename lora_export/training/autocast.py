"""The dtype that a training multiplies in."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from lora_export.options.train import Precision

AUTOCAST_DTYPES: dict[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}


def autocast(device: str | torch.device, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """PyTorch's autocast on a device in this precision; with "no", a context that does nothing."""
    if precision == "no":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, AUTOCAST_DTYPES[precision])
