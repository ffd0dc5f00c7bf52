"""Who watches outputs knows of those of its own run alone."""

from __future__ import annotations

import threading
from pathlib import Path

from lora_export.storage.atomic_output import stage_file
from lora_export.storage.publication import watched


def write(path: Path) -> None:
    with stage_file(path, inputs=[]) as stage:
        (stage / path.name).write_bytes(b"1")


def test_a_run_knows_nothing_of_the_outputs_of_another_thread(tmp_path: Path) -> None:
    known, others = list[str](), list[str]()

    def other() -> None:
        with watched(lambda contents: others.extend(path.name for path in contents)):
            write(tmp_path / "other")

    with watched(lambda contents: known.extend(path.name for path in contents)):
        write(tmp_path / "own")
        for target in (other, lambda: write(tmp_path / "unwatched")):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
        write(tmp_path / "again")
    write(tmp_path / "after")
    assert (known, others) == (["own", "again"], ["other"])
