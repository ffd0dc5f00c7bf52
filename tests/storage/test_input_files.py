"""Only regular files are accepted as inputs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lora_export.errors import InputRefused
from lora_export.storage import input_files


def test_an_input_must_exist(tmp_path):
    input_files.must_exist(tmp_path, "adapter")
    refusals: dict[Path, str] = {
        tmp_path / "none": "there is no adapter at .*/none",
        tmp_path / ("n" * 300): "File name too long",
    }
    for path, message in refusals.items():
        with pytest.raises(InputRefused, match=message):
            input_files.must_exist(path, "adapter")


@pytest.mark.fault(41)
def test_only_regular_files_and_links_to_them_are_listed(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b", "sub/a"):
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to("b")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    assert input_files.regular_files(tmp_path) == [tmp_path / "b", tmp_path / "link", tmp_path / "sub/a"]
