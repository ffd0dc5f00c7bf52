"""Progress bars: on stderr, and on a terminal only; a merge, which is short, imports them there only."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console


def _terminal() -> Console:
    # The stream itself and not whatever `sys.stderr` is later: while exporters are kept quiet, that is a sink.
    return Console(file=sys.stderr)


@contextlib.contextmanager
def byte_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that hears how many more bytes are done."""
    console = _terminal()
    if not console.is_terminal:  # a disabled bar still keeps its books, at every block of a merge
        yield lambda _: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


@contextlib.contextmanager
def step_progress(what: str) -> Iterator[Callable[[int, int, float], None]]:
    """Yield a function that hears (steps done, steps in all, loss)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = _terminal()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what)

        def on_step(done: int, steps: int, loss: float) -> None:
            bar.update(task, completed=done, total=steps, description=f"{what}, loss {loss:.3f}")

        yield on_step


@contextlib.contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """Yield a function that hears what is being done now; on a terminal it is shown with the time it takes."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = _terminal()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what: bar.update(task, description=what)
