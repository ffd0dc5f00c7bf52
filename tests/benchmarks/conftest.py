"""The table of goals at the end of a run."""

from __future__ import annotations

import pytest

from benchmarks import goals


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if goals.MEASURED:
        terminalreporter.section("goals")
        terminalreporter.write_line(goals.table_of_goals(goals.MEASURED))
