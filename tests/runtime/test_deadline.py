"""A time limit: what it stops, and what it leaves alone."""

from __future__ import annotations

import threading
import weakref

from lora_export.runtime.deadline import deadline


def test_run_that_is_too_long_is_stopped_and_known_as_such() -> None:
    stopped = threading.Event()
    with deadline(0.01, stopped.set) as expired:
        assert stopped.wait(10)
    assert expired.is_set()


def test_run_that_ends_in_time_is_not_stopped() -> None:
    stopped = threading.Event()
    with deadline(0.05, stopped.set) as expired:
        pass
    assert not stopped.wait(0.2) and not expired.is_set()


def test_nothing_keeps_what_is_stopped_alive_afterwards() -> None:
    """A graph's weights may be views of a mapped file, which cannot be closed before the last view is gone."""

    class Run:
        def stop(self) -> None: ...

    run = Run()
    alive, threads = weakref.ref(run), threading.active_count()
    with deadline(60, run.stop):
        pass
    del run
    assert alive() is None and threading.active_count() == threads
