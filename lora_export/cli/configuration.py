"""Defaults of options from the table `[tool.lora-export]` of the nearest pyproject.toml."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from lora_export.storage import input_files

TABLE = "tool.lora-export"
NOT_OPTIONS = frozenset({"help", "version"})


def defaults_of(command: click.Command, name: str) -> tuple[dict[str, Any], Path | None]:
    """The defaults of a command's options, by parameter, and the file that has them; nothing where there is none.

    Keys of the table itself count for every command that has the option, those of `[tool.lora-export.COMMAND]` for one.
    Raises click.UsageError for a file that cannot be read, and for a key that no command has.
    """
    found = find_table()
    if found is None:
        return {}, None
    path, table = found
    options = options_by_name(command)
    shared = {key: value for key, value in table.items() if not isinstance(value, dict)}
    own = _own_table(table, name, path)
    if unknown := [key for key in own if _spelled(key) not in options]:
        raise _unknown(path, f"{TABLE}.{name}", unknown[0], options)
    _check_shared(shared, options, path)
    known = {key: value for key, value in shared.items() if _spelled(key) in options} | own
    defaults = {}
    for key, value in known.items():
        option = options[_spelled(key)]
        defaults[option.name or ""] = [value] if option.multiple and not isinstance(value, list) else value
    return defaults, path


def find_table() -> tuple[Path, dict[str, Any]] | None:
    """The nearest pyproject.toml, from the current folder upward, that has the table; and the table."""
    try:
        here = Path.cwd()
    except OSError:  # the current folder was removed
        return None
    for folder in (here, *here.parents):
        path = folder / "pyproject.toml"
        if path.is_file() and (table := _table_in(path)) is not None:
            return path, table
    return None


def options_by_name(command: click.Command) -> dict[str, click.Option]:
    """The options of a command by their long spelling, without its dashes."""
    options = (parameter for parameter in command.params if isinstance(parameter, click.Option))
    named = {long_name(option): option for option in options}
    return {name: option for name, option in named.items() if name not in NOT_OPTIONS}


def long_name(option: click.Option) -> str:
    """`min-retention` of the option --min-retention."""
    return max(option.opts, key=len).lstrip("-")


def _table_in(path: Path) -> dict[str, Any] | None:
    from lora_export.storage.json_files import MAX_JSON

    with input_files.open_regular(path) as file:
        text = file.read(MAX_JSON + 1)
    if len(text) > MAX_JSON:
        raise click.UsageError(f"{path} has more than {MAX_JSON:,} bytes")
    if b"lora-export" not in text:  # the parser is imported where there is something to parse
        return None
    import tomllib

    try:
        table = tomllib.loads(text.decode("utf-8")).get("tool", {}).get("lora-export")
    except (ValueError, AttributeError) as error:
        raise click.UsageError(f"{path} is not valid TOML: {error}") from error
    if table is not None and not isinstance(table, dict):
        raise click.UsageError(f"{path}: {TABLE} is not a table")
    return table


def _own_table(table: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    from lora_export.cli import COMMANDS

    for key, value in table.items():
        if isinstance(value, dict) and key not in COMMANDS:
            raise _unknown(path, TABLE, key, COMMANDS)
    own = table.get(name, {})
    if not isinstance(own, dict):
        raise click.UsageError(f"{path}: {TABLE}.{name} is not a table")
    return own


def _check_shared(shared: Iterable[str], options: Mapping[str, click.Option], path: Path) -> None:
    """Refuse keys that no command has. The other commands are imported for a key that this one lacks."""
    others = [key for key in shared if _spelled(key) not in options]
    if not others:
        return
    from lora_export.cli import COMMANDS, command_named

    known = {option for name in COMMANDS for option in options_by_name(command_named(name))}
    for key in others:
        if _spelled(key) not in known:
            raise _unknown(path, TABLE, key, known)


def _spelled(key: str) -> str:
    return key.replace("_", "-")


def _unknown(path: Path, table: str, key: str, known: Iterable[str]) -> click.UsageError:
    nearest = difflib.get_close_matches(_spelled(key), list(known), n=1, cutoff=0.3)
    hint = f"; the nearest is `{nearest[0]}`" if nearest else ""
    return click.UsageError(f"{path}: [{table}] has the key `{key}`, which is no option{hint}")
