"""What a merge costs beside the copy that it cannot avoid, and beside PEFT and mergekit.

The base has the shape of a Llama of 1.1 billion parameters in bf16 (2.2 GB, four shards, random weights). Needs
10 GB of disk. `bench_gpu.py` has the merge on a GPU. mergekit wants other versions of its libraries: name its program
by MERGEKIT=/path/to/mergekit-yaml.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks.checkpoints import QUERY_VALUE, adapter, llama
from benchmarks.goals import goal
from benchmarks.measure import COMPILED, Run, keep, machine, ratio, run, settle, side_by_side, table

RUNS, RUNS_OF_PEERS = 5, 3
TARGETS = {"all linear": None, "q and v": QUERY_VALUE}
PEFT_NAME = "PEFT merge_and_unload and save_pretrained"
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("llama") / "base")


@pytest.mark.parametrize("which", TARGETS)
def test_a_merge_beside_the_copy_and_its_peers(base, which, request):
    place = base.parent
    made = adapter(place / which.replace(" ", "-"), TARGETS[which])
    out = place / "out"
    size = sum(path.stat().st_size for path in base.iterdir())

    def settled() -> None:
        for folder in (out, place / "cache"):
            shutil.rmtree(folder, ignore_errors=True)
        settle(place, size)

    def ours(*options: str, **variables: str) -> Run:
        return run([sys.executable, "-m", "lora_export", "merge", base, made, "-o", out, *options], **variables)

    copy = "`cp -r` and `sync`"
    rivals = {
        copy: lambda: run(["cp", "-r", base, out], ["sync"]),
        "lora-export merge": ours,
        "lora-export merge, compiled": lambda: ours(**COMPILED),
        "lora-export merge --hash sha256": lambda: ours("--hash", "sha256"),
    }
    results = side_by_side(rivals, settled, RUNS)
    peers = {"lora-export merge": ours, PEFT_NAME: lambda: run([sys.executable, "-c", PEFT, base, made, out])}
    mergekit = os.environ.get("MERGEKIT") or shutil.which("mergekit-yaml")
    if mergekit:
        recipe = place / "recipe.yaml"
        recipe.write_text(
            json.dumps({"models": [{"model": f"{base}+{made}"}], "merge_method": "passthrough", "dtype": "bfloat16"})
        )
        peers["mergekit"] = lambda: run([mergekit, recipe, out, "--lora-merge-cache", place / "cache"])
    beside = side_by_side(peers, settled, RUNS_OF_PEERS)
    settled()
    shutil.rmtree(out, ignore_errors=True)
    name = f"merge, {which}"
    told = f"{RUNS} rounds beside the copy, {RUNS_OF_PEERS} beside the peers. {machine()}"
    keep(name, f"{table(results, copy)}\n\n{table(beside, 'lora-export merge')}\n\n{told}")
    goal(f"merge, {which}, compiled", results, "lora-export merge, compiled", copy, 1.25)
    goal(f"merge, {which}, beside PEFT's", beside, "lora-export merge", PEFT_NAME, 1 / 7)
    ours_peak = max(run.peak for run in beside["lora-export merge"])
    assert ours_peak <= 160
    if which == "all linear":
        assert ratio(beside, PEFT_NAME, "lora-export merge") >= 5
        assert min(run.peak for run in beside[PEFT_NAME]) >= 15 * ours_peak
