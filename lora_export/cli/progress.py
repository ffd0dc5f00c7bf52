"""How far a command is, on stderr: a bar on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import IO, TYPE_CHECKING

from lora_export.callbacks import OnProgress, Progress, ignore
from lora_export.cli import startup
from lora_export.cli.verbosity import Verbosity, verbosity
from lora_export.errors import duration, one_line
from lora_export.report.console import is_no_terminal

if TYPE_CHECKING:
    from rich.console import Console

LINE_EVERY = 60.0  # seconds
BAR = 20  # columns


class CurrentStage:
    """The part of the work that goes on, and its clock."""

    def __init__(self) -> None:
        self.event, self.begun = Progress("starting"), time.monotonic()

    def take(self, event: Progress) -> bool:
        """Whether this event begins another stage."""
        is_other = event.stage != self.event.stage
        if is_other:
            self.begun = time.monotonic()
        self.event = event
        return is_other

    def __str__(self) -> str:
        """How much is done, and how long the rest will take at the speed until now, else how long it has taken."""
        event, taken = self.event, time.monotonic() - self.begun
        clock = f"{duration(taken)} so far"
        if event.total and event.done:
            clock = f"{duration(taken * (event.total - event.done) / event.done)} left"
        return ", ".join(filter(None, (_amount(event), clock, event.detail)))


def _amount(event: Progress) -> str:
    """`1.2 GB of 3.4 GB`, `12 of 90 steps`, or nothing where it is not counted."""
    if not event.total:
        return ""
    if event.unit != "bytes":
        return f"{event.done:,} of {event.total:,} {event.unit}"
    from rich.filesize import decimal

    return f"{decimal(event.done)} of {decimal(event.total)}"


@contextlib.contextmanager
def shown() -> Iterator[OnProgress]:
    """Yield a callback that shows the stage, the work done and the time. Without a terminal, -q leaves it out."""
    # The stream itself, not what `sys.stderr` is later: exporters are silenced by replacing it.
    with _display(sys.stderr) as show:
        yield startup.frozen_at_first(show)


def _display(stream: IO[str] | None) -> AbstractContextManager[OnProgress]:
    """The bar, the lines or nothing, as this stream and the verbosity have it."""
    if stream is None or not is_no_terminal(stream):
        from rich.console import Console

        console = Console(file=stream)
        if console.is_terminal:
            return _bar(console)
        stream = console.file
    return contextlib.nullcontext(ignore) if verbosity() is Verbosity.QUIET else _lines(stream)


@contextlib.contextmanager
def _lines(to: IO[str]) -> Iterator[OnProgress]:
    stage, ended = CurrentStage(), threading.Event()

    def print_lines() -> None:
        while not ended.wait(LINE_EVERY):
            with contextlib.suppress(OSError, ValueError):  # stderr is full or closed: the work goes on
                print(one_line(f"{stage.event.stage}: {stage}"), file=to, flush=True)

    def show(event: Progress) -> None:
        stage.take(event)

    thread = threading.Thread(target=print_lines, daemon=True)
    thread.start()
    try:
        yield show
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def _bar(console: Console) -> Iterator[OnProgress]:
    from rich import progress as bars
    from rich.table import Column
    from rich.text import Text

    class Details(bars.ProgressColumn):
        """What is known of the stage. Its clock goes on between two events."""

        def render(self, _: bars.Task) -> Text:
            return Text(str(stage), no_wrap=True, overflow="ellipsis")

    stage = CurrentStage()
    # The bar keeps its width on a narrow terminal, and the end of the details is cut.
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(BAR, table_column=Column(min_width=BAR)),
        Details(),
    )
    with bars.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def show(event: Progress) -> None:
            nonlocal task
            if stage.take(event):
                bar.remove_task(task)
                task = bar.add_task(event.stage, total=None)
            bar.update(task, completed=event.done, total=event.total or None)

        yield show
