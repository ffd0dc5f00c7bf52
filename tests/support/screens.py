"""What a function of `report` prints."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from rich.console import Console


def printed(show: Callable[..., None], *arguments: Any, terminal: bool = False, width: int = 40) -> str:
    file = io.StringIO()
    to = Console(file=file, force_terminal=terminal, width=width, color_system="standard" if terminal else "auto")
    show(to, *arguments)
    return file.getvalue()
