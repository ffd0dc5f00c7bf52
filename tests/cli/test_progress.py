"""How far a command is: shown on stderr, and on a terminal only."""

from __future__ import annotations

import io
import re
import sys

import pytest

from lora_export.callbacks import Progress, ignore
from lora_export.cli import progress
from lora_export.cli.progress import shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make stderr a terminal. Called in the test itself: pytest replaces stderr after its fixtures."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    return stream


def test_without_a_terminal_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with shown() as on_progress:
        assert on_progress is ignore
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("event", "parts"),
    [
        (Progress("merging", 2_000_000, 2_000_000, "bytes"), ("merging", "2.0/2.0 MB")),
        (Progress("training", 3, 7, "steps", "loss 0.693"), ("training, loss 0.693", "3/7")),
        (Progress("verifying"), ("verifying",)),
    ],
)
def test_stage_work_and_detail_are_shown_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, event: Progress, parts: tuple[str, ...]
) -> None:
    terminal = on_a_terminal(monkeypatch)
    with shown() as on_progress:
        on_progress(event)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert [part for part in parts if part not in plain] == []


def test_each_stage_has_a_clock_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_terminal(monkeypatch)
    from rich import progress as bars

    tasks = []
    add = bars.Progress.add_task

    def recorded(bar: bars.Progress, *arguments: object, **options: object) -> object:
        tasks.append(arguments[0])
        return add(bar, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(bars.Progress, "add_task", recorded)
    with shown() as on_progress:
        for stage in ("one", "one", "two"):
            on_progress(Progress(stage))
    assert tasks == ["starting", "one", "two"]


def test_the_amount_is_empty_where_nothing_is_counted() -> None:
    from rich import progress as bars

    bar = bars.Progress(progress._amount())
    task = bar.add_task("reading", total=None, unit="")
    assert progress._amount().render(bar.tasks[task]).plain == ""
