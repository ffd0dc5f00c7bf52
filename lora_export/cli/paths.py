"""Paths as users write them: `~` is the home folder.

A shell expands it at the start of a word alone: not in `--output=~/x` or `-a fr=~/x`, and not in a script of CI.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem


class FilePath(click.Path):
    """A path as a `pathlib.Path`."""

    def __init__(self, **checks: Any):
        super().__init__(path_type=Path, **checks)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click does, in the home folder where the path begins with `~`."""
        return super().convert(_expanded(value) if isinstance(value, str) else value, param, ctx)


class Source(click.ParamType[str]):
    """MODEL or [NAME=]ADAPTER: a path, a name that is looked up, or a name with a path."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ARG002
        """The text, with the home folder where the path begins with `~`."""
        name, separator, path = value.partition("=")
        return f"{name}={_expanded(path)}" if separator and path.startswith("~") else _expanded(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG002
        """Let the shell complete a path."""
        return [CompletionItem(incomplete, type="file")]


def _expanded(text: str) -> str:
    """The path in the home folder; a file whose name begins with `~` stays what it is."""
    if not text.startswith("~") or os.path.lexists(text):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:  # there is no such user
        return text
