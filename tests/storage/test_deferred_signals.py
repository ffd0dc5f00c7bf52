"""Ctrl-C and SIGTERM wait for the end of a short step."""

from __future__ import annotations

import signal
import threading

import pytest

from lora_export.storage.deferred_signals import deferred_signals


def test_ctrl_c_waits_for_the_end_of_the_block():
    steps = []
    with pytest.raises(KeyboardInterrupt), deferred_signals():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # one exception for both
        steps.append("done")
    assert steps == ["done"]


def test_an_exception_in_the_block_restores_the_handlers():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), deferred_signals():
        raise ZeroDivisionError
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_another_thread_may_use_it():
    ran = []

    def work() -> None:
        with deferred_signals():
            ran.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ran == [signal.getsignal(signal.SIGINT)]
