"""What a merge into an .onnx costs beside the copy of its files, and beside merging in PyTorch and exporting again.

The graph is a Llama of 138 million parameters in fp32 (tied embeddings, random weights), exported once; the adapter
has rank 16 on every linear layer.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from benchmarks.llama_graph import MAKE
from benchmarks.measure import Run, keep, machine, ratio, run, settle, side_by_side, table

RUNS, RUNS_OF_PEERS = 5, 2
COPY, OURS = "`cp -r` and `sync`", "lora-export merge"
PEER = "PEFT merge_and_unload and transformers' OnnxExporter"
EXPORT = """
import sys
from pathlib import Path
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.exporters import OnnxConfig, OnnxExporter
model, adapter, out = sys.argv[1:]
merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).merge_and_unload().eval()
ids = torch.ones(2, 16, dtype=torch.long)
exported = OnnxExporter().export(merged, {"input_ids": ids, "attention_mask": ids}, OnnxConfig(dynamic=True))
Path(out).mkdir()
OnnxExporter.save_program(exported.program, Path(out) / "model.onnx")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graph")
    run([sys.executable, "-c", MAKE, folder])
    return folder


@pytest.mark.parametrize("which", ["inside", "beside"])
def test_a_merge_into_a_graph_beside_the_copy_and_exporting_again(place: Path, which: str) -> None:
    graph, out = place / which, place / "out"
    size = sum(path.stat().st_size for path in graph.iterdir())

    def settled() -> None:
        shutil.rmtree(out, ignore_errors=True)
        settle(place, size, "*")

    def ours() -> Run:
        out.mkdir()
        line = [sys.executable, "-m", "lora_export", "merge", graph / "model.onnx", place / "adapter"]
        return run([*line, "-o", out / "model.onnx"])

    def again() -> Run:
        return run([sys.executable, "-c", EXPORT, place / "model", place / "adapter", out])

    results = side_by_side({COPY: lambda: run(["cp", "-r", graph, out], ["sync"]), OURS: ours}, settled, RUNS)
    beside = side_by_side({OURS: ours, PEER: again}, settled, RUNS_OF_PEERS)
    told = f"{RUNS} rounds beside the copy, {RUNS_OF_PEERS} beside the peer. {machine()}"
    keep(f"merge into a graph, weights {which}", f"{table(results, COPY)}\n\n{table(beside, OURS)}\n\n{told}")
    assert max(there.peak for there in results[OURS]) <= 200
    assert ratio(beside, PEER, OURS) >= 15
