"""What `verify MERGED --base BASE` costs beside the merge: a Llama of 1.1, and experts of 1.6 billion parameters.

Needs 13 GB of disk.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import checkpoints
from benchmarks.measure import Run, keep, machine, ratio, run, settle, side_by_side, table

ROUNDS = 5
MERGE, VERIFY = "lora-export merge", "lora-export verify --base"
MOST_TIMES, MOST_MEMORY = 3, 300  # of the merge's seconds; MiB

# name -> the base, the adapter
INPUTS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Path]]] = {
    "all linear": (checkpoints.llama, checkpoints.adapter),
    "q and v": (checkpoints.llama, lambda folder: checkpoints.adapter(folder, checkpoints.QUERY_VALUE)),
    "experts": (checkpoints.experts, checkpoints.expert_adapter),
}


@pytest.mark.parametrize("which", INPUTS)
def test_a_check_beside_the_merge(tmp_path: Path, which: str) -> None:
    make_base, make_adapter = INPUTS[which]
    base, adapter, out = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter"), tmp_path / "out"
    size = sum(path.stat().st_size for path in base.iterdir())
    program = [sys.executable, "-m", "lora_export"]

    def merge() -> Run:
        shutil.rmtree(out, ignore_errors=True)
        settle(tmp_path, size)
        return run([*program, "merge", base, adapter, "-o", out])

    rivals = {MERGE: merge, VERIFY: lambda: run([*program, "verify", out, "--base", base, "-a", adapter])}
    results = side_by_side(rivals, lambda: None, ROUNDS)
    keep(f"verify --base, {which}", f"{table(results, MERGE)}\n\n{ROUNDS} rounds. {machine()}")
    assert ratio(results, VERIFY, MERGE) <= MOST_TIMES
    assert max(found.peak for found in results[VERIFY]) <= MOST_MEMORY
    shutil.rmtree(tmp_path)
