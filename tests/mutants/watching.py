"""Plugins of pytest for runs in copies of the package, and what they wrote down, read again.

`Watch` writes what processor time each test takes, and whether it passes. Which mutants a test reaches is written by
the package itself: a call of `hit` stands at each of them, in child processes too. `Chosen` runs some tests and
no others.
"""

from __future__ import annotations

import json
import os
import signal
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

HIT = """import os
_seen = set()

def hit(mutant):
    line = f"{{mutant}} {{os.environ.get('PYTEST_CURRENT_TEST', '').rpartition(' ')[0]}}\\n"
    if line not in _seen:
        _seen.add(line)
        with open({path!r}, "a", encoding="utf-8") as file:
            file.write(line)
"""


def used() -> float:
    """The processor time of this process and its children, in seconds. Other programs do not lengthen it."""
    return sum(os.times()[:4])


class Watch:
    def __init__(self, folder: Path, longest: float) -> None:
        self._log = folder / "tests.jsonl"
        self._failed: set[str] = set()
        self._longest = longest
        signal.signal(signal.SIGPROF, self._stop)

    def _stop(self, *_: object) -> NoReturn:
        pytest.fail("too slow to be of use")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        start = used()
        result = yield
        line = {"test": item.nodeid, "seconds": round(used() - start, 3), "passed": item.nodeid not in self._failed}
        with self._log.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line)}\n")
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        signal.setitimer(signal.ITIMER_PROF, self._longest)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:  # what is skipped finds nothing
            self._failed.add(report.nodeid)


class Chosen:
    def __init__(self, tests: Sequence[str], log: Path) -> None:
        self._tests, self._log = set(tests), log

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid in self._tests]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(f"{report.nodeid}\n")


def read_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


class Watched:
    """What the runs with `Watch` wrote into a folder."""

    def __init__(self, folder: Path) -> None:
        seen = [json.loads(line) for line in read_lines(folder / "tests.jsonl")]
        failed = {each["test"] for each in seen if not each["passed"]} | set(read_lines(folder / "doubted"))
        self.seconds = {each["test"]: each["seconds"] for each in seen if each["test"] not in failed}
        self.heaviest: Counter[str] = Counter()  # file -> its slowest test, which made what others share
        for each in seen:
            file = each["test"].partition("::")[0]
            self.heaviest[file] = max(self.heaviest[file], each["seconds"])
        self.tests: defaultdict[str, set[str]] = defaultdict(set)  # mutant -> those that reach it
        for line in read_lines(folder / "hits"):
            mutant, _, test = line.partition(" ")
            if test in self.seconds:
                self.tests[mutant].add(test)
        self.reach = Counter(test for tests in self.tests.values() for test in tests)
