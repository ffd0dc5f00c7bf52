"""What a function of this package tells its caller while it runs: messages, and how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """What is being done, and how much of it is done."""

    stage: str  # such as "exporting the base"
    done: int = 0
    total: int = 0  # 0: unknown
    unit: str = ""  # of `done` and `total`: "bytes" or "steps"
    detail: str = ""  # such as "loss 0.693"


OnMessage = Callable[[str], None]
OnProgress = Callable[[Progress], None]


def ignore(_: object) -> None:
    """The default callback: does nothing."""


def note_each(on_message: OnMessage, notes: Iterable[str]) -> None:
    """Pass on what the user should know."""
    for note in notes:
        on_message(f"note: {note}")


def in_stages(on_progress: OnProgress) -> Callable[[str], None]:
    """Return a function that reports the start of a stage by its name."""
    return lambda stage: on_progress(Progress(stage))


def in_bytes(on_progress: OnProgress, stage: str, total: int) -> Callable[[int], None]:
    """Return a function that takes how many more bytes are done, and reports the sum. `total` is in bytes."""
    done = 0

    def more(count: int) -> None:
        nonlocal done
        done = min(done + count, total)  # headers are written too, and are not part of the total
        on_progress(Progress(stage, done, total, "bytes"))

    return more


def each_once(on_message: OnMessage) -> OnMessage:
    """Pass a message on, and not again."""
    seen: set[str] = set()

    def once(message: str) -> None:
        if message not in seen:
            seen.add(message)
            on_message(message)

    return once
