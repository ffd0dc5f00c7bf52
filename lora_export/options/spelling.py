"""How a message names an option: as the command line spells it, as Python does, or as a file of settings.

Code below the command line names options by their Python names. While the command line runs, `named` and `command`
spell them as flags. Where a file has the options, `named` spells its entries: `dtype = "float32"`. Everywhere else
they spell keywords:

    named("dtype", "float32")           --dtype float32                      dtype="float32"
    named("verify", False)              --no-verify                          verify=False
    command("onnx", "G", lora="nodes")  lora-export onnx G --lora nodes      export_onnx("G", lora="nodes")

The spelling is chosen when the text is made. A text that stands in a module's constant would be made too early: write
a function.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

# Names of flags -> keywords of Python; at last those of Expectations
KEYWORDS = {"combine": "combination", "combine_seed": "seed", "prompt": "prompts", "image": "images"}
KEYWORDS |= {f"expect_{name}": name for name in ("adapter_sha256", "base_sha256", "signature")}
# Command -> function, where the names differ
FUNCTIONS = {"onnx": "export_onnx", "torchscript": "export_torchscript", "fleet": "run_fleet"}
COMMANDS_ALONE = ("doctor", "guide")  # commands that are no function

Flags = Callable[[], Mapping[str, str]]  # returns flags by Python names, where they are not the names with dashes
EntrySpelling = Callable[[str, object], str | None]  # spells an option and its value; None: the file has no such option


class _Spelling(NamedTuple):
    flags: Flags | None = None  # None: keywords of Python
    entry: EntrySpelling | None = None


_spelling = _Spelling()
UNSET = object()  # the value of an option that is named alone


@contextlib.contextmanager
def as_command_line(flags: Flags | None = dict) -> Iterator[None]:
    """Spell options as flags within the block. It holds for all threads of the process.

    `flags` is called when an option is spelled. None: as keywords.
    """
    with _spelled(_Spelling(flags)):
        yield


def as_python() -> contextlib.AbstractContextManager[None]:
    """Spell options as keywords within the block, also while the command line runs."""
    return as_command_line(None)


@contextlib.contextmanager
def as_entries(entry: EntrySpelling) -> Iterator[None]:
    """Spell options as entries of a file within the block. Commands, and options that it lacks, stay as they are."""
    with _spelled(_spelling._replace(entry=entry)):
        yield


@contextlib.contextmanager
def _spelled(spelling: _Spelling) -> Iterator[None]:
    global _spelling  # noqa: PLW0603 - a process has one interface to its user at a time
    before, _spelling = _spelling, spelling
    try:
        yield
    finally:
        _spelling = before


def is_command_line() -> bool:
    """Whether commands are spelled as those of the command line."""
    return _spelling.flags is not None


def named(name: str, value: object = UNSET) -> str:
    """Spell an option, and its value where one is meant: `--dtype float32`, or `dtype="float32"`.

    `name` is the Python name. A value in capitals stands for one: `named("inputs", "FILE.npz")`.
    """
    entry = _spelling.entry(name, value) if _spelling.entry else None
    return entry or (_keyword(name, value) if _spelling.flags is None else _flag(name, value, _spelling.flags()))


def command(name: str, *arguments: str, **options: object) -> str:
    """Spell a call of another command with these arguments and options, by their Python names."""
    if _spelling.flags is not None or name in COMMANDS_ALONE:
        flags = {} if _spelling.flags is None else _spelling.flags()
        words = [*arguments, *(_flag(*each, flags) for each in options.items())]
        return " ".join(["lora-export", name, *words])
    words = [*(f'"{argument}"' for argument in arguments), *(_keyword(*each) for each in options.items())]
    return f"{FUNCTIONS.get(name, name)}({', '.join(words)})"


def _flag(name: str, value: object, flags: Mapping[str, str]) -> str:
    flag = flags.get(name) or f"--{name.replace('_', '-')}"
    if value is False:
        return f"--no-{flag.lstrip('-')}"
    if isinstance(value, Mapping):
        return " ".join(f"{flag} {key}={entry_text(entry)}" for key, entry in value.items())
    return flag if value is UNSET or value is True else f"{flag} {value}"


def _keyword(name: str, value: object) -> str:
    name = KEYWORDS.get(name, name)
    if value is UNSET:
        return f"{name}="
    if isinstance(value, Mapping):
        return f"{name}={{{', '.join(f'{_quoted(key)}: {_quoted(entry)}' for key, entry in value.items())}}}"
    return f"{name}={_quoted(value)}"


def entry_text(value: object) -> str:
    """A value of a table: on the command line, several flags of one are `1,0,1`."""
    return ",".join(str(int(each)) for each in value) if isinstance(value, tuple) else str(value)


def _quoted(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
