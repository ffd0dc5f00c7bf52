"""A merge into a GGUF file beside the copy of its bytes, and beside a merge into as many bytes of bf16.

The file has the shape of a Llama of 1.1 billion parameters, in Q8_0 and in Q4_K, with random codes. Each merge is
measured by NumPy and by compiled code. With calibration the model runs, and has to stay out of memory.
"""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from benchmarks.checkpoints import LlamaShape, adapter, llama
from benchmarks.goals import goal
from benchmarks.measure import COMPILED, Run, keep, machine, run, settle, side_by_side, table
from support.gguf_files import HALVES, blocks, written

RUNS = 3
COPY, PLAIN, MERGE = "`cp` and `sync`", "merge into as many bytes of bf16", "merge into GGUF"
FAST_PLAIN, FAST_MERGE = f"{PLAIN}, compiled", f"{MERGE}, compiled"
MOST_MEMORY = 300  # MiB
MOST_CALIBRATED = 2048  # MiB: PyTorch, the largest tensor in fp32, and the matrices of the widest inputs
MOST_TIMES = 4.0  # the merge of as many bytes of bf16
SCALES = {**HALVES, Kind.Q8_0: {0: 0.0006}}  # the positions of fp16 numbers in a block, and these


def model(path: Path, kind: Kind, shape: LlamaShape) -> Path:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(shape.layers)
    writer.add_embedding_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_value_heads)
    writer.add_context_length(2048)
    writer.add_feed_forward_length(shape.inner)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(shape.words)
    writer.add_tokenizer_model("no_vocab")
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

    def settled() -> None:
        settle(tmp_path, base.stat().st_size)

    def merged(*line: object, **variables: str) -> Run:
        return run([sys.executable, "-m", "lora_export", "merge", *line, "--overwrite"], **variables)

    into_floats, into_blocks = (plain, its, "-o", folder), (base, own, "-o", out, "--min-retention", "0")
    rivals = {
        COPY: functools.partial(run, ["cp", base, copy], ["sync"]),
        PLAIN: functools.partial(merged, *into_floats),
        MERGE: functools.partial(merged, *into_blocks),
        FAST_PLAIN: functools.partial(merged, *into_floats, **COMPILED),
        FAST_MERGE: functools.partial(merged, *into_blocks, **COMPILED),
    }
    results = side_by_side(rivals, settled, RUNS)
    used = ", ".join(f"{name} {median(one.used for one in found):.1f} s" for name, found in results.items())
    name = f"merge into GGUF, {kind.name}"
    keep(name, f"{table(results, COPY)}\n\nProcessor time: {used}. {RUNS} rounds. {machine()}")
    goal(name, results, MERGE, PLAIN, MOST_TIMES)
    goal(f"{name}, compiled", results, FAST_MERGE, FAST_PLAIN, MOST_TIMES)
    assert max(run.peak for name in (MERGE, FAST_MERGE) for run in results[name]) <= MOST_MEMORY


def test_calibration_does_not_load_the_model(tmp_path: Path) -> None:
    shape = LlamaShape()
    base = model(tmp_path / "base.gguf", Kind.Q4_K, shape)
    own = adapter(tmp_path / "adapter", ["self_attn.q_proj", "mlp.down_proj"], replace(shape, layers=1))
    config = own / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "layers_to_transform": [0]}))
    inputs, out = tmp_path / "inputs.npz", tmp_path / "out.gguf"
    np.savez(inputs, input_ids=np.random.default_rng(0).integers(0, shape.words, (40, 64)))
    line = [sys.executable, "-m", "lora_export", "merge", base, own, "-o", out, "--min-retention", "0"]
    found = run([*line, "--calibration", inputs])
    floats = 4 * sum(int(np.prod(size)) for size in shape.tensors.values()) / 2**20
    keep(
        "merge into GGUF, calibrated",
        f"Q4_K, two layers calibrated by 2,560 tokens: {found.used:.0f} s of processor time, of which the run of the "
        f"model is the largest part; {found.peak:.0f} MiB at the peak, and the model has {floats:.0f} MiB in fp32. "
        f"{machine()}",
    )
    assert found.peak <= MOST_CALIBRATED
