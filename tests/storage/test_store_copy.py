"""What PyTorch and onnxruntime open is a copy on the disk, one of each version, until the process ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lora_export.errors import InputRefused
from lora_export.storage.store_copy import on_disk
from lora_export.storage.store_path import newly_opened

if TYPE_CHECKING:
    from support.stores import Stored


def test_a_folder_is_copied_once_for_each_version(stored: Stored) -> None:
    stored.put("m/config.json", b"{}")
    stored.put("m/sub/w", bytes(100_000))
    lines: list[str] = []
    first, again = (on_disk(newly_opened(str(stored / "m")), lines.append) for _ in range(2))
    assert first == again and (first.name, (first / "sub/w").read_bytes()) == ("m", bytes(100_000))
    assert lines == [f"{stored / 'm'}: 2 files, 100 KB copied to {first.parent} until this command ends"]
    stored.put("m/config.json", b"[]")
    other = on_disk(newly_opened(str(stored / "m")), lines.append)
    assert other != first and (other / "config.json").read_bytes() == b"[]" and len(lines) == 2


def test_a_graph_brings_its_data(stored: Stored) -> None:
    for name in ("model.onnx", "model.onnx.0123.data", "other.onnx", "sub/model.onnx"):
        stored.put(f"g/{name}", b"1")
    path = on_disk(stored / "g/model.onnx", print)
    assert sorted(each.name for each in path.parent.rglob("*")) == ["model.onnx", "model.onnx.0123.data"]


def test_nothing_is_copied_of_what_is_on_the_disk_or_missing(stored: Stored, tmp_path: Path) -> None:
    assert on_disk(tmp_path, print) is tmp_path
    with pytest.raises(InputRefused, match=rf"there is no model at {stored.address}/none"):
        on_disk(stored / "none", print)


def test_the_copy_is_removed_when_the_process_ends(stored: Stored) -> None:
    stored.put("m/a", b"1")
    program = (
        "import sys; from lora_export.storage.store_copy import on_disk\n"
        "from lora_export.storage.store_path import place\n"
        "path = on_disk(place(sys.argv[1]), print); assert (path / 'a').is_file(); print(path.parent)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(stored / "m")], capture_output=True, text=True, check=True
    )
    folder = Path(ended.stdout.splitlines()[-1])
    assert folder.name.startswith("lora-export-") and not folder.exists()
