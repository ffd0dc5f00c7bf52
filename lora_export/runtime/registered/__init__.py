"""Runners by name: ours, those that packages register under the entry point `lora_export.runners`, and functions.

A runner is a function that takes the candidate's path and returns a function from inputs to outputs:

    def open_model(path: str) -> Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]: ...

What it returns may state more: `axes` (input -> sizes, None where they vary), `limits` (input -> the least and the
greatest of each size), `plans_memory` (True where memory is reserved for the largest inputs, so that the batch has
limits, too), `notes` (where and how it runs) and `cannot_give` (what of the model's outputs it lacks). It is opened and
called in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from lora_export.errors import InputRefused
from lora_export.user_code import failures_of_user_code, find_function

GROUP = "lora_export.runners"
OPENVINO = "openvino"
# Name -> module:function
OURS = {
    OPENVINO: "lora_export.runtime.registered.openvino:open_compiled",
    "onnx-reference": "lora_export.runtime.reference_session:open_evaluated",
}


def find_runner(name: str) -> Callable[[str], Any]:
    """The function of a runner: `openvino`, a registered name, `package.module:function` or `file.py:function`.

    Raises InputRefused where there is none, or its module fails.
    """
    from importlib.metadata import entry_points  # takes a tenth of a second

    registered = {entry.name: entry.value for entry in entry_points(group=GROUP)}
    location, _, function = {**registered, **OURS}.get(name, name).rpartition(":")
    if not location:
        known = ", ".join(sorted({*registered, *OURS}))
        raise InputRefused(f"there is no runner {name!r}: give one of {known}, or file.py:function")
    return find_function(location, function)


def open_with(name: str, path: str) -> Callable[..., Any]:
    """Open a candidate: the function that computes its outputs.

    Raises InputRefused where the runner fails, or returns something else, and what it raises of our own errors.
    """
    opener = find_runner(name)
    with failures_of_user_code(name):
        opened: Any = opener(path)
        if not callable(opened):
            kind = type(opened).__name__
            raise InputRefused(f"{name} returned {kind}; a runner returns a function from inputs to outputs")
    return cast(Callable[..., Any], opened)


def stated_by(opened: Callable[..., Any]) -> dict[str, Any]:
    """What an opened candidate states of itself, for a message."""
    sizes = {key: dict(getattr(opened, key, {})) for key in ("axes", "limits")}
    lines = {key: [str(line) for line in getattr(opened, key, ())] for key in ("notes", "cannot_give")}
    stated = {key: {str(name): list(own) for name, own in table.items()} for key, table in sizes.items()} | lines
    return {**stated, "plans_memory": bool(getattr(opened, "plans_memory", False))}
