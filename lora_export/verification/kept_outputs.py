"""Outputs that are kept until they are judged: large ones on the disk."""

from __future__ import annotations

import contextlib
import tempfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.runtime.runner import Arrays

LARGEST_IN_MEMORY = 1 << 26  # bytes of one output


def kept(outputs: Arrays) -> Arrays:
    """The same outputs. Large ones are mapped, read-only, from a temporary file without a name.

    The system can take their memory back. Where the disk is full, they stay in memory.
    """
    return {name: _on_disk(array) if array.nbytes > LARGEST_IN_MEMORY else array for name, array in outputs.items()}


def _on_disk(array: NDArray[Any]) -> NDArray[Any]:
    with contextlib.suppress(OSError), tempfile.TemporaryFile() as file:
        np.ascontiguousarray(array).tofile(file)
        file.flush()
        return np.asarray(np.memmap(file, array.dtype, "r", shape=array.shape))
    return array
