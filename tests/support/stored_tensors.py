"""Tensors in safetensors files, as an audit reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lora_export.storage import safetensors_file
from lora_export.verification.against_checkpoint.stored_tensor import StoredTensor
from support.handmade import base_file


def stored(path: Path, values: Any, dtype: Any = np.float32) -> StoredTensor:
    """A file with this one tensor, `fc.weight`, behind another one."""
    file = safetensors_file.open_file(base_file(path, {"a": np.zeros(3), "fc.weight": np.asarray(values)}, dtype))
    return StoredTensor(file, file.entries["fc.weight"])
