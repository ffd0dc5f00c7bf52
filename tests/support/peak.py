"""Run a command as a whole process: `peak.py COMMAND...` prints its exit code, times and peak memory as JSON.

From a small process of its own: what a large one forks counts the large one's memory as having been its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Run:
    code: int
    seconds: float
    peak: float  # MiB, of the largest process
    used: float = 0.0  # seconds of processor time, which a busy machine stretches less


def run(command: Sequence[object], environment: Mapping[str, str] = os.environ) -> Run:
    """Run a command; its own standard output is thrown away."""
    line = [sys.executable, "-S", __file__, *map(str, command)]
    told = subprocess.run(line, check=True, env=environment, stdout=subprocess.PIPE).stdout
    return Run(**json.loads(told))


def main() -> None:
    begun = time.perf_counter()
    process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - begun
    found = Run(process.returncode, seconds, usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime)
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
