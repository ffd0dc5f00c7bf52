"""An export beside the bare exporter's, and where the time of `onnx` goes: MiniLM with an adapter of rank 8 on q and v.

The bare exporter is transformers' own, after PEFT's merge. Both are whole processes that write one graph.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from statistics import median

from benchmarks.measure import Run, keep, machine, run, settle, side_by_side, stages, table
from benchmarks.minilm import BASE, adapter

ROUNDS = 3
OURS, BARE = "lora-export onnx --no-verify", "PEFT merge_and_unload and transformers' OnnxExporter"
PROMISED = 0.8  # times the bare exporter's processor time
EXPORT = """
import sys
from pathlib import Path
import torch
from peft import PeftModel
from transformers import AutoModel
from transformers.exporters import OnnxConfig, OnnxExporter
base, adapter, out = sys.argv[1:]
merged = PeftModel.from_pretrained(AutoModel.from_pretrained(base), adapter).merge_and_unload().eval()
ids = torch.ones(2, 16, dtype=torch.long)
inputs = {name: ids for name in ("input_ids", "attention_mask", "token_type_ids")}
exported = OnnxExporter().export(merged, inputs, OnnxConfig(dynamic=True))
OnnxExporter.save_program(exported.program, Path(out) / "model.onnx")
"""


def test_an_export_beside_the_bare_exporter(tmp_path: Path) -> None:
    made, out = adapter(tmp_path / "adapter"), tmp_path / "out"
    line = ["onnx", BASE, "-a", made, "-o", out / "model.onnx"]

    def settled() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        settle(BASE, 0)

    def ours() -> Run:
        return run([sys.executable, "-m", "lora_export", *line, "--no-verify"])

    def bare() -> Run:
        return run([sys.executable, "-c", EXPORT, BASE, made, out])

    results = side_by_side({BARE: bare, OURS: ours}, settled, ROUNDS)
    used = {name: median(each.used for each in runs) for name, runs in results.items()}
    settled()
    split = stages(*line)
    rows = [
        "| stage of `onnx` | seconds |",
        "|---|---|",
        *(f"| {what} | {spent:.2f} |" for what, spent in split.items()),
    ]
    both = f"Processor time: {used[OURS]:.1f} s, and {used[BARE]:.1f} s of the bare exporter."
    lines = [table(results, BARE), "", *rows, "", f"{both} {ROUNDS} rounds, the stages of one more. {machine()}"]
    keep("export, MiniLM", "\n".join(lines))
    assert used[OURS] <= PROMISED * used[BARE]
