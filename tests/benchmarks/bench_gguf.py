"""A merge into a GGUF file beside the copy of its bytes, and beside a merge into as many bytes of bf16.

The file has the shape of a Llama of 1.1 billion parameters, in Q8_0 and in Q4_K, with random codes.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from benchmarks.checkpoints import LlamaShape, adapter, llama
from benchmarks.goals import goal
from benchmarks.measure import keep, machine, run, settle, side_by_side, table
from support.gguf_files import HALVES, blocks, written

RUNS = 3
COPY, PLAIN, MERGE = "`cp` and `sync`", "merge into as many bytes of bf16", "merge into GGUF"
MOST_MEMORY = 300  # MiB
MOST_TIMES = 4.0  # the merge of as many bytes of bf16
SCALES = {**HALVES, Kind.Q8_0: {0: 0.0006}}  # the positions of fp16 numbers in a block, and these


def model(path: Path, kind: Kind, shape: LlamaShape) -> Path:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(shape.layers)
    writer.add_embedding_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_value_heads)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.layers)
    for name, size in shape.tensors.items():
        is_matrix = len(size) == 2
        tensor = blocks(kind, size) if is_matrix else np.ones(size, np.float32)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor, raw_dtype=kind if is_matrix else Kind.F32)
    return written(writer, path)


@pytest.mark.parametrize(("kind", "layers"), [(Kind.Q8_0, 11), (Kind.Q4_K, 5)], ids=["Q8_0", "Q4_K"])
def test_a_gguf_file_costs_a_few_merges_of_its_bytes(
    kind: Kind, layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("support.gguf_files.HALVES", SCALES)
    whole = LlamaShape()
    base, own = model(tmp_path / "base.gguf", kind, whole), adapter(tmp_path / "adapter")
    as_large = replace(whole, layers=layers)
    plain, its = llama(tmp_path / "plain", as_large), adapter(tmp_path / "its", shape=as_large)
    out, folder, copy = tmp_path / "out.gguf", tmp_path / "out", tmp_path / "copy.gguf"
    merge = [sys.executable, "-m", "lora_export", "merge"]

    def settled() -> None:
        settle(tmp_path, base.stat().st_size)

    rivals = {
        COPY: functools.partial(run, ["cp", base, copy], ["sync"]),
        PLAIN: functools.partial(run, [*merge, plain, its, "-o", folder, "--overwrite"]),
        MERGE: functools.partial(run, [*merge, base, own, "-o", out, "--overwrite", "--min-retention", "0"]),
    }
    results = side_by_side(rivals, settled, RUNS)
    keep(f"merge into GGUF, {kind.name}", f"{table(results, COPY)}\n\n{RUNS} rounds. {machine()}")
    goal(f"merge into GGUF, {kind.name}", results, MERGE, PLAIN, MOST_TIMES)
    assert max(run.peak for run in results[MERGE]) <= MOST_MEMORY
