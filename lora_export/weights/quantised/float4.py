"""4-bit floats (E2M1), two in a byte, the first in the low half: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and their negatives.

Scales that are powers of two are stored as exponents (E8M0): 2^(byte - 127). The byte 255 is no number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.storage.block_copy import Bytes

POSITIVE_FLOAT4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
FLOAT4_VALUES = np.concatenate([POSITIVE_FLOAT4, -POSITIVE_FLOAT4])
NOT_A_NUMBER = 255


def _pairs() -> NDArray[np.complex64]:
    """The two values of each byte, as one element: one look-up for both."""
    both = np.arange(256)
    return np.stack([FLOAT4_VALUES[both & 0xF], FLOAT4_VALUES[both >> 4]], axis=1).view(np.complex64).reshape(-1)


FLOAT4_PAIRS = _pairs()


def unpack_floats(packed: Bytes) -> NDArray[np.float32]:
    """The floats in some bytes, two for each."""
    return FLOAT4_PAIRS.take(packed).view(np.float32)


def powers_of_two(name: str, stored: NDArray[Any]) -> NDArray[np.float32]:
    """2^(byte - 127). Raises InputRefused for the byte that is no number; `name` is the part's, for the message."""
    if (stored == NOT_A_NUMBER).any():
        raise InputRefused(f"{name}: a scale of {NOT_A_NUMBER} is no number. The file is damaged")
    scales: NDArray[np.float32] = np.ldexp(np.float32(1), stored.astype(np.int32) - 127)
    return scales
