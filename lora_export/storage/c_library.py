"""Functions of the C library that Python does not wrap, where the system has them."""

from __future__ import annotations

import ctypes
from typing import Any


def c_function(name: str) -> Any | None:
    """Look up a function of the C library. Returns None where there is none of that name.

    A call stores its error for `ctypes.get_errno()`.
    """
    try:
        library = ctypes.CDLL(None, use_errno=True)
    except (TypeError, OSError):  # on Windows, the C library has no default name
        return None
    return getattr(library, name, None)
