"""Processes of their own: they answer, and end with their owner, after their time, and without their memory."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lora_export.isolation.process import IsolatedProcess, ProcessEnded, read_request, write_message

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux copies a process that has threads")


def serve(requests: io.BufferedIOBase, answers: io.BufferedIOBase) -> None:
    while True:
        request, arrays = read_request(requests)
        if request["do"] == "compute":
            while True:
                pass
        if request["do"] == "end":
            return
        if request["do"] == "signal":
            os.kill(os.getpid(), signal.SIGRTMIN + 6)
        if request["do"] == "lie":
            answers.write((7).to_bytes(8, "little") + b"no JSON")
            answers.flush()
        taken = bytearray(request.get("take", 0))
        write_message(answers, {"taken": len(taken)}, {name: 2 * array for name, array in arrays.items()})


@pytest.fixture
def process() -> Iterator[IsolatedProcess]:
    made = IsolatedProcess.copy_of(serve, memory=256 << 20)
    yield made
    made.close()


def test_a_copy_answers_again_and_again(process: IsolatedProcess) -> None:
    for number in range(3):
        header, arrays = process.ask({"do": "double"}, {"x": np.array([number])}, 60)
        assert (header, arrays["x"].tolist()) == ({"taken": 0}, [2 * number])
    assert process.is_running
    process.close()
    assert not process.is_running


@pytest.mark.parametrize(
    ("request_", "reason", "too_slow"),
    [
        ({"do": "compute"}, "SIGKILL", True),
        ({"do": "end"}, "exit code 0", False),
        ({"do": "signal"}, "signal 40", False),
        ({"do": "take", "take": 1 << 30}, "exit code 0", False),
        ({"do": "lie"}, "it sent no outputs", False),
    ],
)
def test_a_process_that_does_not_answer_has_ended(
    process: IsolatedProcess, request_: dict[str, object], reason: str, too_slow: bool
) -> None:
    with pytest.raises(ProcessEnded, match=reason) as ended:
        process.ask(request_, {}, 0.5 if too_slow else 60)
    assert ended.value.too_slow is too_slow and not process.is_running


def test_an_endless_copy_ends_without_its_parent() -> None:
    """As after a kill of the parent: nobody waits for the answer, and nobody ends the process."""
    process = IsolatedProcess.copy_of(serve, memory=256 << 20)
    write_message(process._streams[0], {"do": "compute", "seconds": 0.1}, {})
    until = time.monotonic() + 60
    while process.is_running and time.monotonic() < until:
        time.sleep(0.05)
    assert not process.is_running


def test_a_copy_holds_nothing_of_its_parent_open(process: IsolatedProcess) -> None:
    number = process._process.number  # type: ignore[attr-defined]
    process.ask({"do": "double"}, {}, 60)
    assert len(list(Path(f"/proc/{number}/fd").iterdir())) <= 7  # 0 to 2, nowhere twice, two of messages


def test_a_process_ends_with_the_object_that_has_it() -> None:
    process = IsolatedProcess.copy_of(serve, memory=256 << 20)
    number = process._process.number  # type: ignore[attr-defined]
    os.kill(number, 0)
    del process
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)
