"""How far a command is, as stderr shows it."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest

from lora_export.callbacks import Progress
from lora_export.cli import progress
from lora_export.cli.progress import shown
from lora_export.cli.verbosity import VERBOSITY_KEY, Verbosity


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_stderr(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, columns: int = 120) -> io.StringIO:
    """Make it stderr. Called in the test itself: pytest replaces stderr after its fixtures."""
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    return stream


def plain(stream: io.StringIO) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())


TRAINING = Progress("training", 3, 7, "steps", "loss 0.693, 12,345 tokens/s, 1,234 MiB")


@pytest.mark.parametrize(
    ("event", "parts"),
    [
        (Progress("merging", 1_500_000, 2_000_000, "bytes"), ("merging", "1.5 MB of 2.0 MB, 0 s left")),
        (TRAINING, ("training", "3 of 7 steps, 0 s left, loss 0.693, 12,345 tokens/s, 1,234 MiB")),
        (Progress("verifying"), ("verifying", "0 s so far")),
    ],
)
def test_stage_work_and_detail_are_shown_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, event: Progress, parts: tuple[str, ...]
) -> None:
    terminal = on_stderr(monkeypatch, Terminal())
    with shown() as on_progress:
        on_progress(event)
    assert [part for part in parts if part not in plain(terminal)] == []


def test_a_narrow_terminal_keeps_the_bar_and_cuts_the_details(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_stderr(monkeypatch, Terminal(), columns=60)
    with shown() as on_progress:
        on_progress(TRAINING)
    line = next(line for line in plain(terminal).splitlines() if "training" in line)
    assert line.count("━") + line.count("╸") + line.count("╺") == progress.BAR
    assert "3 of 7 steps" in line and "MiB" not in line


def test_each_stage_has_a_clock_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = progress.CurrentStage()
    monkeypatch.setattr(stage, "begun", time.monotonic() - 90)
    stage.take(Progress("starting", 30, 60, "steps"))
    assert str(stage) == "30 of 60 steps, 1 min left"
    stage.take(Progress("proving"))
    assert str(stage) == "0 s so far"


def test_without_a_terminal_a_line_is_printed_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0.01)
    log = on_stderr(monkeypatch, io.StringIO())
    with shown() as on_progress:
        on_progress(Progress("a\nstage", 1, 4, "layers"))
        line, deadline = re.compile(r"^a\\nstage: 1 of 4 layers, \d+ s left$", re.MULTILINE), time.monotonic() + 60
        while len(line.findall(log.getvalue())) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    printed = log.getvalue().splitlines()
    assert len(line.findall(log.getvalue())) >= 2  # before them may be lines of the first stage, on a busy machine
    time.sleep(0.03)
    assert log.getvalue().splitlines() == printed


def test_a_closed_log_does_not_stop_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0.01)
    log = on_stderr(monkeypatch, io.StringIO())
    with shown() as on_progress:
        log.close()
        time.sleep(0.05)
        on_progress(Progress("proving"))
    assert log.closed


def test_quiet_prints_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    import click

    log = on_stderr(monkeypatch, io.StringIO())
    monkeypatch.setattr(progress, "LINE_EVERY", 0.01)
    with click.Context(click.Command("x")) as context:
        context.meta[VERBOSITY_KEY] = Verbosity.QUIET
        with shown() as on_progress:
            on_progress(Progress("proving"))
            time.sleep(0.05)
    assert log.getvalue() == ""
