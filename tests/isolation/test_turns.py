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
        other = threading.Thread(target=lambda: pytorch_turn().__enter__(), daemon=True)
        other.start()
        other.join(20)
        os._exit(other.is_alive())
    ended.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
