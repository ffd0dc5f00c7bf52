"""Threads take turns; a child process waits for no thread of its parent."""

from __future__ import annotations

import os
import threading

import pytest

from lora_export.isolation.turns import pytorch_turn


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_takes_its_turn_beside_a_thread_of_the_parent() -> None:
    entered, ended = threading.Event(), threading.Event()

    def wait() -> None:
        with pytorch_turn():
            entered.set()
            ended.wait(60)

    thread = threading.Thread(target=wait)
    thread.start()
    entered.wait(60)
    if not (child := os.fork()):
        threading.Timer(10, os._exit, [1]).start()
        with pytorch_turn():
            os._exit(0)
    ended.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
