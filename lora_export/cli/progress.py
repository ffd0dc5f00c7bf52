"""How far a command is: shown on stderr, and on a terminal only."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_export.callbacks import OnProgress, Progress, ignore

if TYPE_CHECKING:
    from rich.progress import ProgressColumn


@contextlib.contextmanager
def shown() -> Iterator[OnProgress]:
    """Yield a callback that shows the stage, the work done and the time. Without a terminal it does nothing."""
    from rich.console import Console

    # The stream itself, not what `sys.stderr` is later: exporters are silenced by replacing it.
    console = Console(file=sys.stderr)
    if not console.is_terminal:  # a disabled bar would still count every block of a merge
        yield ignore
        return
    from rich import progress as bars

    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), _amount(), bars.TimeElapsedColumn())
    with bars.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None, unit="")
        stage = ""

        def show(event: Progress) -> None:
            nonlocal task, stage
            if event.stage != stage:  # each stage has a clock of its own
                bar.remove_task(task)
                stage, task = event.stage, bar.add_task(event.stage, total=None, unit="")
            text = f"{event.stage}, {event.detail}" if event.detail else event.stage
            bar.update(task, description=text, completed=event.done, total=event.total or None, unit=event.unit)

        yield show


def _amount() -> ProgressColumn:
    """The column of the work done: bytes, steps, or nothing where it is not counted."""
    from rich import progress as bars
    from rich.text import Text

    of_bytes, of_steps = bars.DownloadColumn(), bars.MofNCompleteColumn()

    class Amount(bars.ProgressColumn):
        def render(self, task: bars.Task) -> Text:
            unit = task.fields["unit"]
            return of_bytes.render(task) if unit == "bytes" else of_steps.render(task) if unit == "steps" else Text()

    return Amount()
