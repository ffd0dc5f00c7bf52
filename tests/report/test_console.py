"""The console: nothing is cut, and nothing in a name is markup."""

from __future__ import annotations

import io

from lora_export.report.console import console


def test_console_cuts_nothing_and_reads_no_markup() -> None:
    file = io.StringIO()
    to = console(file)
    to.print("[bold]W[/bold] :smile: " + "1234567890 " * 30)
    assert file.getvalue() == "[bold]W[/bold] :smile: " + "1234567890 " * 30 + "\n"
