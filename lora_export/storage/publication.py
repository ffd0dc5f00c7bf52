"""Outputs that are about to appear: who has to know of each one before it has its name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

# Takes names of files or folders, and where the content is that will have each name
OnPublication = Callable[[Mapping[Path, Path]], None]
_watching: list[OnPublication] = []


@contextlib.contextmanager
def watched(on_publication: OnPublication) -> Iterator[None]:
    """Let a function know each output of this block that is whole, before it appears. Its error prevents that."""
    _watching.append(on_publication)
    try:
        yield
    finally:
        _watching.pop()


def announce(contents: Mapping[Path, Path]) -> None:
    """Tell the function of the innermost `watched` block which names will have which contents."""
    for on_publication in _watching[-1:]:
        on_publication(contents)


def staged_files(stage: Path, folder: Path) -> dict[Path, Path]:
    """The names that the files of a stage will have in a folder, and where they are."""
    return {folder / path.relative_to(stage): path for path in stage.rglob("*") if path.is_file()}
