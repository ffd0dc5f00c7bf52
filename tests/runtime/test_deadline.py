"""A time limit: what it stops, and what it leaves alone."""

from __future__ import annotations

import threading

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
