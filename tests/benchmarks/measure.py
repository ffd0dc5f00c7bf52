"""Whole processes, timed side by side: seconds on the wall and peak memory, and the table that is kept of them."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support import peak, tables
from support.peak import Run

README = Path(__file__).with_name("README.md")
COMPILED = {"PYTHONPATH": str(Path(sys.prefix) / "kernel")}  # where `make` puts the compiled arithmetic
# Variables that a workplace may have and users do not: the first two hide what a BLAS makes of the processor, the last
# has our files compiled anew in each run (0.06 s), which an installed package is once.
GIVEN_BACK = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "PYTHONDONTWRITEBYTECODE")

# Prints each stage of a command and its seconds. The last stage includes the end of the process's own work.
STAGES = """
import sys, time
begun = time.perf_counter()
from lora_export import cli
from lora_export.cli import progress
import contextlib
marks = []
@contextlib.contextmanager
def shown():
    yield lambda event: marks.append((event.stage, time.perf_counter()))
progress.shown = shown  # before the command imports it
code = cli.run(sys.argv[1:])
marks = [("Python and imports", begun), *marks, ("", time.perf_counter())]
for (what, start), (_, end) in zip(marks, marks[1:]):
    print(f"{what}\\t{end - start}", file=sys.stderr)
sys.exit(code)
"""


def run(*commands: Sequence[object], **variables: str) -> Run:
    """Run commands one after the other, as whole processes: the seconds of all, the peak of the largest."""
    environment = {name: value for name, value in os.environ.items() if name not in GIVEN_BACK} | variables
    runs = [peak.run(command, environment) for command in commands]
    assert not any(run.code for run in runs), f"{commands} ended with {[run.code for run in runs]}"
    used = sum(run.used for run in runs)
    return Run(0, sum(run.seconds for run in runs), max(run.peak for run in runs), used)


def stages(*line: object) -> dict[str, float]:
    """Seconds of each stage of one of our commands; stages of one kind are summed."""
    command = [sys.executable, "-c", STAGES, *map(str, line)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    found: dict[str, float] = {}
    for row in filter(lambda row: "\t" in row, printed.splitlines()):
        stage, seconds = row.split("\t")
        kind = stage.removeprefix("verifying, ").partition(" batch")[0]
        found[kind] = found.get(kind, 0.0) + float(seconds)
    return found


def settle(inputs: Path, size: int, files: str = "*.safetensors") -> None:
    """The same start for everybody: inputs in the page cache, nothing left to write, and memory at hand.

    A virtual machine gives free memory back to its host; whoever comes first afterwards would pay for getting
    it again, several times as much as for the copy itself.
    """
    for path in filter(Path.is_file, inputs.rglob(files)):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    os.sync()
    memory = np.ones(3 * size, np.uint8)
    del memory


def side_by_side(
    rivals: Mapping[str, Callable[[], Run]], settled: Callable[[], None], runs: int
) -> dict[str, list[Run]]:
    """Each rival in turn, again and again, so that what the machine does meanwhile meets all of them."""
    results: dict[str, list[Run]] = {name: [] for name in rivals}
    for _ in range(runs):
        for name, rival in rivals.items():
            settled()
            results[name].append(rival())
            print(f"{name}: {results[name][-1].seconds:.2f} s, {results[name][-1].peak:.0f} MiB", flush=True)
    return results


def table(results: Mapping[str, Sequence[Run]], limit: str) -> str:
    """Medians, and how many times as long as `limit` each takes, as the median of the rounds."""
    lines = [f"| | wall, median (least to most) | {limit} = 1 | peak memory |", "|---|---|---|---|"]
    for name, runs in results.items():
        seconds = sorted(run.seconds for run in runs)
        peak = f"{median(run.peak for run in runs):.0f} MiB"
        wall = f"{median(seconds):.2f} s ({seconds[0]:.2f} to {seconds[-1]:.2f})"
        lines.append(f"| {name} | {wall} | {ratio(results, name, limit):.2f} | {peak} |")
    return "\n".join(lines)


def ratio(results: Mapping[str, Sequence[Run]], one: str, other: str) -> float:
    """How many times as long as the other one takes: the median over the rounds."""
    return median(a.seconds / b.seconds for a, b in zip(results[one], results[other], strict=True))


def machine() -> str:
    """Processor, memory, and the versions that matter."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "torch", "transformers", "peft"))
    return (
        f"{len(os.sched_getaffinity(0))} cores of {cpu}, {memory:.0f} GiB, Linux {platform.release()}, "
        f"Python {platform.python_version()}, {packages}; {datetime.date.today()}"
    )


def keep(name: str, text: str) -> None:
    """Put a result into the README beside this file, in the place of the former one."""
    print(f"\n{text}\n")
    tables.put(README, name, text)
