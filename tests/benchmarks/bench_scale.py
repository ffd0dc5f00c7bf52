"""Seconds and peak memory against the size of the model, as table and plot.

Each command runs once for each size, as a whole process, with an adapter on every linear layer. `verify --model` and
`onnx` run the model in fp64, which takes most of the time: `--loaded-sizes` are theirs, `--sizes` those of `merge` and
`verify --base`. At 1.1 billion parameters this needs 8 GB of disk and 7 GiB of memory, at 3 billion 26 GB and 20 GiB.
Without the model in fp64, 6.7 billion need 28 GB of disk.
Needs matplotlib for the plot.
"""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks.checkpoints import LlamaShape, adapter, llama
from benchmarks.measure import Run, keep, machine, run, settle

SHAPES = {
    0.15: LlamaShape(hidden=768, inner=2048, layers=14, heads=12),
    0.5: LlamaShape(hidden=1536, inner=4096, layers=16, heads=16),
    1.1: LlamaShape(),
    3.0: LlamaShape(hidden=3072, inner=8192, layers=28, heads=24),
    6.7: LlamaShape(hidden=4096, inner=11008, layers=32, heads=32, key_value_heads=32),
}
PLOT = Path(__file__).with_name("scale.svg")
PROGRAM = [sys.executable, "-m", "lora_export"]
FLAT = ("merge", "verify --base")  # whose memory does not depend on the model
MOST_MEMORY = 300  # MiB

Measured = dict[str, dict[float, Run]]  # command -> billions of parameters -> what it cost


def sizes_of(text: str) -> list[float]:
    """Billions of parameters, separated by commas."""
    return [float(size) for size in text.split(",")]


def parameters(shape: LlamaShape) -> float:
    return sum(math.prod(each) for each in shape.tensors.values()) / 1e9


def measure(folder: Path, size: float, measured: Measured, *, is_loaded: bool) -> None:
    shape = SHAPES[size]
    base, made, out, graph = (folder / name for name in ("base", "adapter", "out", "m.onnx"))
    llama(base, shape)
    adapter(made, shape=shape)
    commands = {"merge": ["merge", base, made, "-o", out], "verify --base": ["verify", out, "--base", base, "-a", made]}
    if is_loaded:
        commands |= {
            "verify --model": ["verify", out, "--model", base, "-a", made],
            "onnx": ["onnx", base, "-a", made, "-o", graph],
        }
    for name, words in commands.items():
        settle(base, 0)
        found = run([*PROGRAM, *words])
        print(f"{size} billion, {name}: {found.seconds:.1f} s, {found.peak:.0f} MiB", flush=True)
        measured.setdefault(name, {})[parameters(shape)] = found
    shutil.rmtree(folder)


def table(measured: Measured) -> str:
    sizes = list(measured["merge"])
    lines = [
        f"| billions of parameters | {' | '.join(f'{size:.2f}' for size in sizes)} |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for name, runs in measured.items():
        cells = [f"{runs[size].seconds:.1f} s, {runs[size].peak:.0f} MiB" if size in runs else "" for size in sizes]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(measured: Measured) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.rcParams["svg.hashsalt"] = "scale"
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for name, runs in measured.items():
        axes[0].plot(list(runs), [each.seconds for each in runs.values()], "o-", label=name)
        axes[1].plot(list(runs), [each.peak / 1024 for each in runs.values()], "o-", label=name)
    for each, label in zip(axes, ("seconds", "peak memory, GiB"), strict=True):
        each.set(xlabel="billions of parameters", ylabel=label, xscale="log", yscale="log")
        each.set_xticks(list(measured["merge"]), [f"{size:.2g}" for size in measured["merge"]])
        each.set_xticks([], minor=True)
        each.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(PLOT, metadata={"Date": None})
    plt.close(figure)


def test_seconds_and_memory_against_size(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    measured: Measured = {}
    sizes, loaded = (sizes_of(request.config.getoption(name)) for name in ("--sizes", "--loaded-sizes"))
    for size in sizes:
        (tmp_path / str(size)).mkdir()
        measure(tmp_path / str(size), size, measured, is_loaded=size in loaded)
    keep("scale", f"{table(measured)}\n\nOne run each. {machine()}")
    plot(measured)
    for name in FLAT:
        assert max(each.peak for each in measured[name].values()) <= MOST_MEMORY, name
