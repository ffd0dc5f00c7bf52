"""JSON files are read within bounds."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lora_export.errors import InputRefused
from lora_export.storage import json_files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "X is not JSON"),
        (b'{"a": 1,}', "X is not JSON"),
        (b"\xff", "X is not JSON"),
        (b'{"a":' * 100_000, "X is not JSON"),
        (b"3", "X is not a JSON object"),
        (b'{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}', "X names c more than once"),
    ],
)
def test_json_that_cannot_be_trusted_is_refused(text, message):
    with pytest.raises(InputRefused, match=message):
        json_files.parse_json(text, "X")


@pytest.mark.fault(41)
def test_json_is_read_from_regular_files_only(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"a": [1]}))
    assert json_files.read_json(tmp_path / "a.json") == {"a": [1]}
    os.mkfifo(tmp_path / "fifo")
    refusals: dict[Path, str] = {
        tmp_path / "fifo": "fifo is not a regular file",
        tmp_path: "is not a regular file",
        tmp_path / "none": "none: No such file or directory",
    }
    for path, message in refusals.items():
        with pytest.raises(InputRefused, match=message):
            json_files.read_json(path)
