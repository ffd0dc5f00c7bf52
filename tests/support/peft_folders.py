"""Small PEFT folders with one pair, and with changed tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_export import formats
from lora_export.errors import InputRefused
from lora_export.options.reading import ReadOptions
from support.handmade import peft_adapter

A_KEY, B_KEY = "base_model.model.fc.lora_A.weight", "base_model.model.fc.lora_B.weight"


def refusal(folder: Path, **options: Any) -> str:
    """Why an adapter in any format is not read."""
    with pytest.raises(InputRefused) as refused:
        formats.load(folder, options=ReadOptions(**options))
    return str(refused.value).replace(str(folder), "ADAPTER")


def simple(folder: Path, **config: Any) -> Path:
    return peft_adapter(folder, {"fc": ([[1, 2]], [[1], [2], [3]])}, **config)


def with_tensors(folder: Path, tensors: Mapping[str, Any], **config: Any) -> Path:
    """The simple adapter with other tensors. None removes one."""
    simple(folder, **config)
    stored = load_file(folder / "adapter_model.safetensors") | tensors
    tensors = {name: np.asarray(value, np.float32) for name, value in stored.items() if value is not None}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
