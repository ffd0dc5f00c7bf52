"""Output without rich."""

from __future__ import annotations

import pytest

from lora_export.report import console


class Tee:
    """What a program may put in place of stdout: an object that only writes."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def test_an_object_that_only_writes_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    file = Tee()
    console.print_line(console.console(file), "[merged] \x1b[31mname", style="dim")  # type: ignore[arg-type]
    assert file.text.startswith("[merged] ") and "\x1b" not in file.text and file.text.endswith("name\n")
