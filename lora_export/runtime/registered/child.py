"""The process that opens a candidate with a runner by name, and runs it. Its arguments are this name and the path.

What the runner prints goes nowhere. It may take any memory and write files: it is the user's own code.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused, LoraExportError
from lora_export.isolation.process import private_streams, read_request, write_message
from lora_export.runtime.registered import open_with, stated_by
from lora_export.user_code import failures_of_user_code


def main() -> None:
    """Serve what a runner opens."""
    name, path = sys.argv[1:3]
    serve(name, lambda: open_with(name, path))


def serve(name: str, opened: Callable[[], Callable[..., Any]]) -> None:
    """Open the candidate, state what its runner states, and answer requests until stdin ends."""
    requests, answers = private_streams()
    try:
        with failures_of_user_code(name):
            run = opened()
            stated = stated_by(run)
    except LoraExportError as error:
        write_message(answers, {"refused": str(error), "kind": type(error).__name__}, {})
        return
    write_message(answers, stated, {})
    with contextlib.suppress(EOFError):
        while True:
            _, inputs = read_request(requests, os.cpu_count() or 1)
            try:
                with failures_of_user_code(name):
                    # Copies: a runner may write into its inputs, and return the same memory every time.
                    outputs, are_named = named_arrays(run({key: value.copy() for key, value in inputs.items()}))
                    write_message(answers, {"are_named": are_named}, outputs)
            except LoraExportError as error:
                write_message(answers, {"failed": str(error)}, {})


def named_arrays(outputs: Any) -> tuple[dict[str, NDArray[Any]], bool]:
    """The outputs of a runner by name, and whether the names are its own: a list or one array has none.

    Raises InputRefused for anything else.
    """
    if isinstance(outputs, Mapping):
        return {str(name): np.asarray(value) for name, value in outputs.items()}, True
    if hasattr(outputs, "__array__"):
        outputs = [outputs]
    if not isinstance(outputs, list | tuple):
        raise InputRefused(f"a run returned {type(outputs).__name__}, and not arrays by name, a list of them, or one")
    return {f"output_{index}": np.asarray(value) for index, value in enumerate(outputs)}, False
