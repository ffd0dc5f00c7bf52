"""How a message names an option: as the command line spells it, or as Python does.

Code below the command line names options by their Python names. While the command line runs, `named` and `command`
spell them as flags. Everywhere else they spell keywords:

    named("dtype", "float32")           --dtype float32                      dtype="float32"
    named("verify", False)              --no-verify                          verify=False
    command("onnx", "G", lora="nodes")  lora-export onnx G --lora nodes      export_onnx("G", lora="nodes")

The spelling is chosen when the text is made. A text that stands in a module's constant would be made too early: write
a function.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

# Python name -> flag, where the flag is not the name with dashes
FLAGS = {
    "adapters": "-a",
    "as_json": "--json",
    "checkpoint": "--base",
    "columns": "--column",
    "expect_adapter_sha256": "--expect-adapter-sha256",
    "graph": "--for",
    "hashing": "--hash",
    "heads": "--head",
    "output": "-o",
    "per_row": "--adapters-per-row",
    "prefixes": "--prefix",
    "reports": "--report",
    "seed_of_combination": "--combine-seed",
    "target_parameters": "--target-parameter",
    "token_indices": "--token-index",
    "weights": "--weight",
}
FUNCTIONS = {"onnx": "export_onnx", "torchscript": "export_torchscript"}  # command -> function, where the names differ
COMMANDS_ALONE = ("doctor", "guide")  # commands that are no function

_on_command_line = False
_UNSET = object()


@contextlib.contextmanager
def as_command_line() -> Iterator[None]:
    """Spell options as flags within the block. It holds for all threads of the process."""
    global _on_command_line  # noqa: PLW0603 - a process has one interface to its user at a time
    before, _on_command_line = _on_command_line, True
    try:
        yield
    finally:
        _on_command_line = before


def named(name: str, value: object = _UNSET) -> str:
    """Spell an option, and its value where one is meant: `--dtype float32`, or `dtype="float32"`.

    `name` is the Python name. A value in capitals stands for one: `named("inputs", "FILE.npz")`.
    """
    return _flag(name, value) if _on_command_line else _keyword(name, value)


def command(name: str, *arguments: str, **options: object) -> str:
    """Spell a call of another command with these arguments and options, by their Python names."""
    if _on_command_line or name in COMMANDS_ALONE:
        return " ".join(["lora-export", name, *arguments, *(_flag(*each) for each in options.items())])
    words = [*(f'"{argument}"' for argument in arguments), *(_keyword(*each) for each in options.items())]
    return f"{FUNCTIONS.get(name, name)}({', '.join(words)})"


def _flag(name: str, value: object) -> str:
    flag = FLAGS.get(name) or f"--{name.replace('_', '-')}"
    if value is False:
        return f"--no-{flag.lstrip('-')}"
    if isinstance(value, Mapping):
        return " ".join(f"{flag} {key}={_entry(entry)}" for key, entry in value.items())
    return flag if value is _UNSET or value is True else f"{flag} {value}"


def _keyword(name: str, value: object) -> str:
    if value is _UNSET:
        return f"{name}="
    if isinstance(value, Mapping):
        return f"{name}={{{', '.join(f'{_quoted(key)}: {_quoted(entry)}' for key, entry in value.items())}}}"
    return f"{name}={_quoted(value)}"


def _entry(value: object) -> str:
    """A value of a table: on the command line, several flags of one are `1,0,1`."""
    return ",".join(str(int(each)) for each in value) if isinstance(value, tuple) else str(value)


def _quoted(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
