"""The README and the guide's pages: their code blocks, and a run of all blocks of a page in order.

The info string after the three backquotes gives the kind of a block:

    sh              shell commands; `# exits 4` behind one is the exit code that it must end with
    sh no-test      not run; a comment above the block gives the reason
    python          run in the page's folder, and every function `test_...` that it defines is called
    python net.py   written to this file; of any language
    text output     the lines are part of what the commands above printed, numbers aside
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lora_export import cli
from support import ROOT

GUIDE = ROOT / "lora_export" / "guide"
FENCE = re.compile(r"^```(?P<info>[^\n`]+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
REASON = re.compile(r"<!-- not run in the tests: \S.*-->\n$")
NUMBER = re.compile(r"-?\b\d[\d,]*(\.\d+)?(e[+-]?\d+)?")
EXIT_CODE = re.compile(r"# exits (\d+)")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    language: str
    info: str  # what follows the language
    text: str
    line: int  # of the page, where the text begins
    has_reason: bool  # a comment above gives the reason why it is not run

    @property
    def is_file(self) -> bool:
        """Whether the block is the text of a file, which its info string names."""
        return "." in self.info

    @property
    def commands(self) -> list[str]:
        """The command lines of a shell block; a line that ends in a backslash continues on the next."""
        return [line for line in self.text.replace("\\\n", " ").splitlines() if line.strip()]


def page_text(page: str) -> str:
    """The text of `README` or of a page of the guide."""
    return (ROOT / "README.md" if page == "README" else GUIDE / f"{page}.md").read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    return list(_blocks(page_text(page)))


def _blocks(text: str) -> Iterator[Block]:
    for found in FENCE.finditer(text):
        language, _, info = found["info"].partition(" ")
        before = text[: found.start()]
        yield Block(language, info, found["text"], before.count("\n") + 2, REASON.search(before) is not None)


class PageRun:
    """Runs the blocks of a page in the current folder."""

    def __init__(self, page: str, capsys: pytest.CaptureFixture[str]):
        self.page, self.capsys = page, capsys
        self.names: dict[str, Any] = {"__name__": f"page {page}"}  # what the Python blocks define
        self.printed = ""  # by the last block that was run

    def run(self, block: Block) -> None:
        if block.language == "sh" and block.info != "no-test":
            self.capsys.readouterr()
            for command in block.commands:
                self._run_command(command, block)
            self.printed = self.capsys.readouterr().out
        elif block.is_file:
            Path(block.info).write_text(block.text, encoding="utf-8")
            sys.modules.pop(Path(block.info).stem, None)  # a test may have imported another module of this name
        elif block.language == "python":
            self._run_python(block)
        elif block.info == "output":
            self._compare(block)

    def _run_command(self, command: str, block: Block) -> None:
        expected = int(found[1]) if (found := EXIT_CODE.search(command)) else 0
        words = shlex.split(command, comments=True)
        if words[0] == "lora-export":
            code = cli.run(words[1:])  # in this process: PyTorch is imported once
        else:
            words[:1] = [sys.executable] if words[0] == "python" else words[:1]
            code = subprocess.run(words if "*" not in command else ["sh", "-c", command], check=False).returncode
        if code != expected:
            output = self.capsys.readouterr()
            pytest.fail(f"{self._place(block)}: `{command}` ended with {code}\n{output.out}\n{output.err}")

    def _run_python(self, block: Block) -> None:
        # Line numbers of a failure are those of the page.
        code = compile("\n" * (block.line - 1) + block.text, f"{self.page}.md", "exec")
        before = set(self.names)
        exec(code, self.names)
        for name in self.names.keys() - before:
            if name.startswith("test_"):
                self.names[name]()

    def _compare(self, block: Block) -> None:
        """The quoted lines occur in the output, in the same sequence; numbers may differ."""
        printed = iter([NUMBER.sub("N", line).rstrip() for line in self.printed.splitlines()])
        for line in block.text.splitlines():
            if NUMBER.sub("N", line).rstrip() not in printed:  # moves on to the line after the one it finds
                pytest.fail(f"{self._place(block)}: `{line}` is not what is printed:\n{self.printed}")

    def _place(self, block: Block) -> str:
        return f"{self.page}.md, block at line {block.line}"


def forget_modules(folder: Path) -> None:
    """Forget modules that a page's blocks imported from its folder: the next page has its own of that name."""
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]
