"""Threads take turns; a child process waits for no thread of its parent."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lora_export.api.onnx import export_onnx
from lora_export.isolation.turns import pytorch_turn
from support.handmade import graph_file, peft_adapter


@pytest.fixture
def other_thread() -> Iterator[None]:
    """Another thread is inside of a turn."""
    entered, ended = threading.Event(), threading.Event()

    def wait() -> None:
        with pytorch_turn():
            entered.set()
            ended.wait(60)

    thread = threading.Thread(target=wait)
    thread.start()
    assert entered.wait(60)
    yield
    ended.set()
    thread.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.usefixtures("other_thread")
def test_a_child_takes_its_turn_beside_a_thread_of_the_parent() -> None:
    if not (child := os.fork()):
        threading.Timer(10, os._exit, [1]).start()
        with pytorch_turn():
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.usefixtures("other_thread")
def test_a_graph_without_pytorch_waits_for_no_other_thread(tmp_path: Path) -> None:
    base = graph_file(tmp_path / "base.onnx", {"m.weight": np.float32([[1, 2], [3, 4], [5, 6]])})
    adapter = peft_adapter(tmp_path / "a", {"m": ([[1, 2, 3]], [[1], [2]])})
    exported = threading.Thread(target=lambda: export_onnx(base, tmp_path / "m.onnx", adapters=adapter, verify=False))
    exported.start()
    exported.join(30)
    assert (tmp_path / "m.onnx").exists() and not exported.is_alive()
