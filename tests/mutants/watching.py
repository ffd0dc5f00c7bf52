"""Plugins of pytest for runs in copies of the package, and what they wrote down, read again.

`Watch` writes which lines each test runs, what processor time it takes, and whether it passes. `Chosen` runs some
tests in an order of its own.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import coverage
import pytest


def used() -> float:
    """The processor time of this process and its children, in seconds. Other programs do not lengthen it."""
    return sum(os.times()[:4])


class Watch:
    def __init__(self, root: Path, folder: Path) -> None:
        self._log = folder / "tests.jsonl"
        self._failed: set[str] = set()
        self._coverage = coverage.Coverage(
            folder / f"lines.{os.getpid()}", source=[str(root / "lora_export")], config_file=False
        )
        self._coverage.set_option("run:relative_files", True)
        self._coverage.start()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._coverage.switch_context(item.nodeid)
        start = used()
        result = yield
        seconds = used() - start
        self._coverage.switch_context("")
        line = {"test": item.nodeid, "seconds": round(seconds, 3), "passed": item.nodeid not in self._failed}
        with self._log.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line)}\n")
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:  # what is skipped finds nothing
            self._failed.add(report.nodeid)

    def pytest_unconfigure(self) -> None:
        self._coverage.stop()
        self._coverage.save()


class Chosen:
    def __init__(self, tests: Sequence[str], log: Path) -> None:
        self._place = {test: place for place, test in enumerate(tests)}
        self._log = log

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid in self._place]
        items.sort(key=lambda item: self._place[item.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(f"{report.nodeid}\n")


class Watched:
    """What the runs with `Watch` wrote into a folder."""

    def __init__(self, folder: Path) -> None:
        log = folder / "tests.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        seen = [json.loads(line) for line in lines]
        doubted = (folder / "doubted").read_text(encoding="utf-8") if (folder / "doubted").exists() else ""
        failed = {each["test"] for each in seen if not each["passed"]} | set(doubted.splitlines())
        self.seconds = {each["test"]: each["seconds"] for each in seen if each["test"] not in failed}
        self.size: Counter[str] = Counter()  # test -> how many lines of the package it runs
        self._lines: defaultdict[str, list[tuple[str, int]]] = defaultdict(list)  # file -> tests, and lines as bits
        select = """select path, context, numbits from line_bits
            join file on file.id = file_id join context on context.id = context_id"""
        for data in folder.glob("lines.*"):
            with sqlite3.connect(data) as base:
                for path, test, bits in base.execute(select):
                    if test in self.seconds:
                        run = int.from_bytes(bits, "little")
                        self.size[test] += run.bit_count()
                        self._lines[path].append((test, run))

    def tests_of(self, file: str, lines: range | None = None) -> list[str]:
        """The tests that run one of these lines of a file, or any."""
        wanted = -1 if lines is None else sum(1 << line for line in lines)
        return sorted({test for test, run in self._lines[file] if run & wanted})
