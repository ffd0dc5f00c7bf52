"""What several tests share: cli."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_export import cli

Capture = pytest.CaptureFixture[str]


def call(*arguments: str | Path) -> int:
    return cli.run([str(argument) for argument in arguments])


def answer(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, Any]:
    """Exit code and the one JSON document on stdout; what went to stderr can be read afterwards."""
    capsys.readouterr()
    code = call(*arguments, "--json")
    told = capsys.readouterr()
    sys.stderr.write(told.err)
    return code, json.loads(told.out)
