"""What a kohya adapter costs on the UNet of Stable Diffusion XL, beside the copy of that UNet.

The UNet has the shapes of diffusers' class (2.57 billion parameters) and random weights in fp16: 5.1 GB in one file. An
adapter of rank 16 is on every linear layer of its attentions and feed-forwards (722 modules), under the flattened names
of the original model, which have to be matched with those of diffusers. Needs 11 GB of disk.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import pytest

from benchmarks.goals import goal
from benchmarks.measure import COMPILED, Run, keep, machine, run, settle, side_by_side, table
from benchmarks.sdxl import kohya_adapter, sdxl_unet
from lora_export import formats, plan
from lora_export.lora import DENOISER
from lora_export.plan.diffusion import of_component
from lora_export.weights.checkpoint import open_checkpoint

RUNS = 2
MODULES = 722


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl")
    kohya_adapter(sdxl_unet(folder / "unet"), folder / "style.safetensors")
    return folder


def seconds_to_match(place: Path) -> float:
    """Names of the adapter to tensors of the base, without reading a weight."""
    adapter = of_component(formats.load(place / "style.safetensors"), DENOISER)
    checkpoint = open_checkpoint(place / "unet")
    begun = time.perf_counter()
    found = plan.make([adapter], checkpoint.specs, rules=checkpoint.rules)
    seconds = time.perf_counter() - begun
    assert len(found.steps) == MODULES
    return seconds


def test_a_merge_of_sdxl_beside_the_copy(place):
    base, out = place / "unet", place / "out"

    def settled() -> None:
        shutil.rmtree(out, ignore_errors=True)
        settle(base, 1 << 28)

    def ours(**variables: str) -> Run:
        line = [sys.executable, "-m", "lora_export", "merge", base, place / "style.safetensors", "-o", out]
        return run(line, **variables)

    copy = "`cp -r` and `sync`"
    rivals = {
        copy: lambda: run(["cp", "-r", base, out], ["sync"]),
        "lora-export merge": ours,
        "lora-export merge, compiled": lambda: ours(**COMPILED),
    }
    results = side_by_side(rivals, settled, RUNS)
    naming = min(seconds_to_match(place) for _ in range(RUNS))
    shutil.rmtree(out, ignore_errors=True)
    told = f"Matching the {MODULES} names takes {naming:.2f} s of a merge. {RUNS} rounds. {machine()}"
    keep("diffusion", f"{table(results, copy)}\n\n{told}")
    goal("merge, SDXL's UNet, compiled", results, "lora-export merge, compiled", copy, 1.6)
    peak = max(run.peak for run in results["lora-export merge"])
    assert peak <= 300  # the ratio is recorded and not held: it was measured on a busy machine only
    assert naming <= 5
