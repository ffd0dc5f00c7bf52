"""What it costs to undo a merge and to extract it again, and a merge of experts, as whole processes."""

from __future__ import annotations

import functools
import shutil
import sys
from pathlib import Path

from benchmarks import checkpoints
from benchmarks.goals import goal
from benchmarks.measure import COMPILED, keep, machine, ratio, run, settle, side_by_side, table

SHAPE = checkpoints.LlamaShape(layers=8)  # 0.5 billion parameters
RUNS = 3
COMMAND = [sys.executable, "-m", "lora_export"]
MERGE, RESIDUAL, UNMERGE, EXTRACT = "merge", "merge --keep-residual", "unmerge", "extract --rank 16"
COPY, EXPERTS = "`cp -r` and `sync`", "merge, every expert"


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*.safetensors"))


def test_undoing_and_extracting(tmp_path: Path) -> None:
    base = checkpoints.llama(tmp_path / "base", SHAPE, shards=2)
    adapter = checkpoints.adapter(tmp_path / "adapter", shape=SHAPE)
    merged, residual, out = tmp_path / "merged", tmp_path / "residual", tmp_path / "out"
    run([*COMMAND, "merge", base, adapter, "-o", merged, "--keep-residual", residual])

    def settled() -> None:
        for made in (out, tmp_path / "other"):
            shutil.rmtree(made, ignore_errors=True)
        (tmp_path / "residual2").unlink(missing_ok=True)
        settle(tmp_path, 1 << 30)

    keeping = [*COMMAND, "merge", base, adapter, "-o", out, "--keep-residual", tmp_path / "residual2"]
    rivals = {
        MERGE: functools.partial(run, [*COMMAND, "merge", base, adapter, "-o", out]),
        RESIDUAL: functools.partial(run, keeping),
        UNMERGE: functools.partial(run, [*COMMAND, "unmerge", merged, adapter, "-o", out, "--base-from", residual]),
        EXTRACT: functools.partial(run, [*COMMAND, "extract", base, merged, "-o", out, "--rank", "16"]),
    }
    results = side_by_side(rivals, settled, RUNS)
    share = f"The residual is {residual.stat().st_size / size_of(base):.2%} of the base."
    keep("undo and extract", f"{table(results, MERGE)}\n\n{share} {RUNS} rounds. {machine()}")
    run([*COMMAND, "unmerge", merged, adapter, "-o", tmp_path / "other", "--base-from", residual])
    for file in base.glob("*.safetensors"):
        assert (tmp_path / "other" / file.name).read_bytes() == file.read_bytes()
    assert max(run.peak for runs in results.values() for run in runs) < size_of(base) >> 20


def test_experts_beside_the_copy(tmp_path: Path) -> None:
    base, adapter = checkpoints.experts(tmp_path / "base"), checkpoints.expert_adapter(tmp_path / "adapter")
    out = tmp_path / "out"

    def settled() -> None:
        shutil.rmtree(out, ignore_errors=True)
        settle(tmp_path, 1 << 30)

    merge = functools.partial(run, [*COMMAND, "merge", base, adapter, "-o", out])
    rivals = {
        COPY: functools.partial(run, ["cp", "-r", base, out], ["sync"]),
        EXPERTS: merge,
        f"{EXPERTS}, compiled": functools.partial(merge, **COMPILED),
    }
    results = side_by_side(rivals, settled, RUNS)
    keep("merge, experts", f"{table(results, COPY)}\n\n{RUNS} rounds. {machine()}")
    goal("merge, every expert, compiled", results, f"{EXPERTS}, compiled", COPY, 1.6)
    assert ratio(results, EXPERTS, COPY) < 20
