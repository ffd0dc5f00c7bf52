"""Archives that torch would not write are refused."""

from __future__ import annotations

import copy
import os
import stat
import struct
import zipfile
from pathlib import Path

import pytest

from fuzz.targets import bounded
from lora_export.errors import InputRefused
from lora_export.models.pt2 import reader
from support.hostile_programs import refused
from support.programs import rewritten


@pytest.mark.parametrize("length", [0, 1, 21, 100, 0.5, -1])
def test_a_file_that_is_cut_short_is_refused(good: Path, tmp_path: Path, length: float) -> None:
    content = good.read_bytes()
    bytes_left = int(length * len(content)) if isinstance(length, float) else length % len(content)
    (tmp_path / "evil.pt2").write_bytes(content[:bytes_left])
    assert "is no .pt2 file" in refused(tmp_path / "evil.pt2")


def test_a_flipped_bit_in_a_weight_is_refused(good: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(good) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith("weights/weight_1"))
    content = bytearray(good.read_bytes())
    name, extra = struct.unpack("<HH", content[info.header_offset + 26 : info.header_offset + 30])
    content[info.header_offset + 30 + name + extra + 5] ^= 1
    (tmp_path / "evil.pt2").write_bytes(content)
    assert "is damaged: Bad CRC-32" in refused(tmp_path / "evil.pt2")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("../evil", "leads out of its folder"),
        ("good/../../evil", "leads out of its folder"),
        ("/etc/evil", "leads out of its folder"),
        ("good/a\\b", "leads out of its folder"),
        ("good//evil", "leads out of its folder"),
        ("evil", "leads out of its folder"),
        ("other/evil", "2 folders at its top"),
        ("good/data/weights/weight_0", "more than once"),
        ("good/\x1b[2J", "control characters"),
    ],
)
def test_member_names_outside_the_folder_are_refused(good: Path, tmp_path: Path, name: str, problem: str) -> None:
    with zipfile.ZipFile(good) as old:
        root = old.namelist()[0].partition("/")[0]
    path = rewritten(good, tmp_path / "evil.pt2", {})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns() if "weight_0" in name else no_warning():
        archive.writestr(name.replace("good", root), b"evil")
    assert problem in refused(path)
    assert not (tmp_path.parent / "evil").exists()


class no_warning:  # noqa: N801 - used as a function is
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_a_member_that_is_a_link_is_refused(good: Path, tmp_path: Path) -> None:
    path = rewritten(good, tmp_path / "evil.pt2", {"data/weights/weight_0": None})
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        info = zipfile.ZipInfo(f"{root}/data/weights/weight_0")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, b"/etc/passwd")
    assert "its member data/weights/weight_0 is a link" in refused(path)


def test_a_compressed_member_is_refused_without_inflating_it(good: Path, tmp_path: Path) -> None:
    path = rewritten(good, tmp_path / "evil.pt2", {"data/weights/weight_0": None})
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        root = archive.namelist()[0].partition("/")[0]
        with archive.open(f"{root}/data/weights/weight_0", "w", force_zip64=True) as member:
            for _ in range(30):
                member.write(bytes(4_000_000))
    assert path.stat().st_size < 300_000
    assert "is compressed" in refused(path)


@pytest.mark.parametrize("claimed", [0xFFFFFFF0, 1 << 20, 1])
def test_a_member_with_a_false_size_is_refused(good: Path, tmp_path: Path, claimed: int) -> None:
    with zipfile.ZipFile(good) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith("models/model.json"))
    content = bytearray(good.read_bytes())
    place = content.rindex(info.filename.encode()) - 46  # of its entry in the directory
    content[place + 20 : place + 28] = struct.pack("<II", claimed, claimed)
    (tmp_path / "evil.pt2").write_bytes(content)
    message = refused(tmp_path / "evil.pt2")
    assert "claim" in message or "is damaged" in message or "is cut short" in message or "Overlapped" in message


def test_overlapping_members_are_refused(good: Path, tmp_path: Path) -> None:
    path = rewritten(good, tmp_path / "evil.pt2", {"data/weights/weight_9": bytes(1_000_000)})
    with zipfile.ZipFile(path, "a") as archive:
        last = archive.filelist[-1]
        for number in range(1000):
            twin = copy.copy(last)
            twin.filename = twin.orig_filename = f"{last.filename}_{number}"
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
        archive._didModify = True  # type: ignore[attr-defined]
    assert "its members claim 1,0" in refused(path)


def test_a_directory_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt2"
    size = 3 << 30
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(size)
        file.write(struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 9, 9, size, 0, 0))
    assert "claims more bytes than such a file needs" in refused(path)


@pytest.mark.parametrize("size", [20 << 30, 0])
def test_a_sparse_file_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "evil.pt2").touch()
    os.truncate(tmp_path / "evil.pt2", size)
    assert "is no .pt2 file" in refused(tmp_path / "evil.pt2")


@pytest.mark.fault(41)
@pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "folder"])
def test_a_fifo_device_or_folder_is_refused_without_waiting(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "evil.pt2"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(kind)
    with bounded(), pytest.raises(InputRefused, match="regular file"):
        reader.read(path)
