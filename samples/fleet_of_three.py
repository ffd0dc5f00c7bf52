"""A fleet: three adapters of one base are planned, merged, proven and shown, by one file.

    python samples/fleet_of_three.py OUT

OUT is a new folder. It gets a small model, three adapters with other ranks, and FLEET.toml. The third adapter is for a
larger model: the plan shows it, and it ends no other. The fleet's exit code is 3, as one is refused. Exits with 0 where
the others are done and proven.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn

import lora_export as le
from lora_export.formats import WriteOptions, peft

LARGER = "of-another-base"
FLEET = """
[[bases]]
path = "base"
adapters = ["adapters/*"]

[[steps]]
step = "merge"
output = "release/{adapter}"

[[steps]]
step = "verify --base"

[[steps]]
step = "verify"             # what the merged model computes, against PyTorch
report = ["reports/{adapter}.json"]
"""


def small_bert(size: int) -> nn.Module:
    sizes = {"hidden_size": size, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes)).eval()


def write_adapter(folder: Path, module: nn.Module, rank: int) -> None:
    fresh = le.create_adapter(module, targets="all-linear", rank=rank, alpha=2 * rank, seed=rank)
    rng = np.random.default_rng(rank)
    pairs = {  # in place of a training
        name: replace(pair, b=rng.normal(0, 0.2, pair.b.shape).astype(np.float32)) for name, pair in fresh.pairs.items()
    }
    folder.mkdir(parents=True)
    peft.write(replace(fresh, pairs=pairs), folder, WriteOptions())


def main(out: Path) -> int:
    torch.manual_seed(0)
    small_bert(32).save_pretrained(out / "base")
    for name, size, rank in (("english", 32, 2), ("french", 32, 4), (LARGER, 48, 4)):
        write_adapter(out / "adapters" / name, small_bert(size), rank)
    (out / "fleet.toml").write_text(FLEET)
    with contextlib.chdir(out):  # paths of the file are relative to the current folder
        plan = le.run_fleet("plan", "fleet.toml")
        for problem in plan.problems:
            print(f"{problem.adapter}: {problem.text.splitlines()[0]}")
        le.run_fleet("run", "fleet.toml", jobs=2, on_message=print)
        status = le.run_fleet("status", "fleet.toml", reports=["fleet.html", "fleet.xml"])
    for job in status.jobs:
        print(f"{job.adapter}, {job.step}: {job.outcome}")
    print(f"exit code of the fleet: {status.exit_code}")
    outcomes = {job.outcome for job in status.jobs if job.adapter != LARGER}
    is_refused = all(job.outcome not in outcomes for job in status.jobs if job.adapter == LARGER)
    return 0 if outcomes == {"done", "same"} and is_refused else status.exit_code or 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
