"""Failures of a model's own code: an error with the model's name and the cause, and no traceback."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from lora_export.errors import LoraExportError, RuntimeRefused

LONGEST = 400  # characters of a cause: some contain tensors
# Of PyTorch and Python, where memory is short: a failure of the machine
NO_MEMORY = re.compile("can't allocate memory|not enough memory|can't start new thread")


@contextlib.contextmanager
def named_failures(module: nn.Module, inputs: Iterable[str], which: str = "inputs", remedy: str = "") -> Iterator[None]:
    """Turn an exception of the module's forward into RuntimeRefused, with its cause in one sentence.

    `inputs` are the names of what the module is called with, and `which` is what the message calls them.
    `remedy` ends it.
    """
    try:
        yield
    except (LoraExportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if NO_MEMORY.search(str(error)):
            raise
        raise RuntimeRefused(
            f"{type(module).__name__} itself fails on the {which} ({', '.join(inputs)}): {innermost_cause(error)}"
            f"{remedy and f'. {remedy}'}"
        ) from error


def innermost_cause(error: BaseException) -> str:
    """The first paragraph of the innermost cause's message, and the line of the model that it names."""
    while error.__cause__ is not None:
        error = error.__cause__
    message = str(error).strip()
    first = " ".join(message.partition("\n\n")[0].split())
    line = re.search(r"The following call raised this error:\s+File \"[^\"]*?([^\"/\\]+)\", (.+)\n\s*(.+)", message)
    first = f"{first[:LONGEST]} ..." if len(first) > LONGEST else first
    where = f" ({line[1]}, {line[2].strip()}: `{line[3].strip()}`)" if line else ""
    return f"{first or type(error).__name__}{where}"
