"""Calls that end after a time, or at Ctrl-C."""

from __future__ import annotations

import functools
import math
import signal
import threading
import time
import weakref

import pytest

from lora_export.isolation.process import call_within, deadline


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


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_time_that_no_clock_has_is_none_that_ends_a_run() -> None:
    stopped = threading.Event()
    with deadline(1e12, stopped.set) as expired:
        assert call_within(1e12, lambda: time.sleep(0.05), stopped.set) is None
    assert not stopped.is_set() and not expired.is_set()


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


def test_a_call_in_time_has_its_result_and_its_error() -> None:
    stopped = threading.Event()
    assert call_within(math.inf, lambda: 7, stopped.set) == 7
    with pytest.raises(ZeroDivisionError):
        call_within(60, lambda: 1 // 0, stopped.set)
    assert not stopped.is_set()


def test_a_call_that_is_too_long_is_stopped() -> None:
    stopped = threading.Event()
    with pytest.raises(TimeoutError):
        call_within(0.05, lambda: stopped.wait(60), stopped.set)
    assert stopped.is_set()


def test_an_endless_call_ends_at_ctrl_c() -> None:
    """An endless operator of a library does not return to Python, where Ctrl-C would be seen."""
    stopped, begun = threading.Event(), time.monotonic()
    press = functools.partial(signal.pthread_kill, threading.main_thread().ident, signal.SIGINT)
    threading.Timer(0.1, press).start()
    with pytest.raises(KeyboardInterrupt):
        call_within(60, lambda: stopped.wait(60), stopped.set)
    assert stopped.is_set() and time.monotonic() - begun < 30
