"""How long the command line takes to answer when it has nothing to do."""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import pytest

RUNS = 10
PROMISED = 0.3  # seconds of processor time, which a busy machine does not stretch


def processor_time() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(*arguments: str) -> tuple[float, float]:
    """Seconds of processor time and on the wall."""
    wall, used = time.perf_counter(), processor_time()
    subprocess.run([sys.executable, "-m", "lora_export", *arguments], stdout=subprocess.DEVNULL, check=True)
    return processor_time() - used, time.perf_counter() - wall


@pytest.mark.parametrize("arguments", [["--help"], ["merge", "--help"], ["doctor", "--help"]], ids=" ".join)
def test_help_answers_at_once(arguments):
    used, wall = min(timed(*arguments) for _ in range(RUNS))
    print(f"\nlora-export {' '.join(arguments)}: {used * 1000:.0f} ms of processor time, {wall * 1000:.0f} ms in all")
    assert used < PROMISED
