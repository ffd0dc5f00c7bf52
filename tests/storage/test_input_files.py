"""Only regular files are accepted as inputs."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from lora_export.errors import InputRefused
from lora_export.storage import input_files


def test_an_input_must_exist(tmp_path):
    input_files.must_exist(tmp_path, "adapter")
    (tmp_path / "adapter").touch()
    (tmp_path / "link").symlink_to("gone")
    refusals: dict[Path, str] = {
        tmp_path / "none": "there is no adapter at .*/none$",
        tmp_path / "adpter": "there is no adapter at .*/adpter; a similar name there is adapter$",
        tmp_path / "link": "/link is a symbolic link to gone, which does not exist$",
        tmp_path / "none" / "adapter": "there is no adapter at .*/none/adapter$",
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


@pytest.mark.parametrize("change", ["written", "replaced", "replaced and put back", "removed", "added"])
def test_change_of_a_file_while_it_is_judged_is_refused(tmp_path, change):
    file = tmp_path / "model"
    file.write_bytes(b"1234")
    os.utime(file, ns=(0, 0))

    time.sleep(0.02)  # more than one tick of the clock of a file system

    def change_it():
        if change == "written":
            with file.open("r+b") as opened:
                opened.write(b"4321")
            os.utime(file, ns=(0, 0))  # the time of change is not the user's to set
        elif change == "removed":
            file.unlink()
        elif change == "added":
            (tmp_path / "other").touch()
        else:
            file.rename(tmp_path.parent / f"{tmp_path.name}.aside")
            if change == "replaced":
                file.write_bytes(b"1234")
            else:
                (tmp_path.parent / f"{tmp_path.name}.aside").rename(file)

    refused = pytest.raises(InputRefused, match="model changed while it was judged")
    with refused, input_files.unchanged(file, lambda: input_files.regular_files(tmp_path)):
        change_it()


def test_files_that_are_only_read_are_unchanged(tmp_path):
    (tmp_path / "model").write_bytes(b"1234")
    with input_files.unchanged(tmp_path, lambda: input_files.regular_files(tmp_path)):
        assert (tmp_path / "model").read_bytes() == b"1234"
