"""Outputs that are about to appear: who has to know of each one before it has its name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path

# Takes names of files or folders, and where the content is that will have each name
OnPublication = Callable[[Mapping[Path, Path]], None]
# Of this context, so that runs in two threads of a process do not know of each other's outputs
_watching: ContextVar[OnPublication | None] = ContextVar("_watching", default=None)


@contextlib.contextmanager
def watched(on_publication: OnPublication) -> Iterator[None]:
    """Let a function know each output of this block that is whole, before it appears. Its error prevents that."""
    before = _watching.set(on_publication)
    try:
        yield
    finally:
        _watching.reset(before)


def announce(contents: Mapping[Path, Path]) -> None:
    """Tell the function of the innermost `watched` block of this context which names will have which contents."""
    if (on_publication := _watching.get()) is not None:
        on_publication(contents)


def staged_files(stage: Path, folder: Path) -> dict[Path, Path]:
    """The names that the files of a stage will have in a folder, and where they are."""
    return {folder / path.relative_to(stage): path for path in stage.rglob("*") if path.is_file()}
