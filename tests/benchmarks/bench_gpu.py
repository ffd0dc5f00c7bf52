"""What a GPU gains: a merge, a proof, a training step, and adapters beside the weights. `make bench-gpu` runs it.

Needs an NVIDIA GPU, a PyTorch that sees it and onnxruntime-gpu; 10 GB of disk and of memory. The processor's times of
the same run stand beside the GPU's, and the peers run on the GPU, too.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
import pytest

import lora_export as le
from benchmarks import minilm
from benchmarks.bench_train import beside_peft
from benchmarks.checkpoints import LlamaShape, adapter, llama
from benchmarks.measure import COMPILED, Run, keep, machine, run, settle, side_by_side, table
from lora_export.runtime.environment_probes import PROVIDERS

pytestmark = pytest.mark.cuda

DEVICE: Literal["cpu", "cuda"] = "cuda"
ROUNDS = 3
MERGED = LlamaShape()  # 1.1 billion parameters
PROVEN = LlamaShape(hidden=1536, inner=4096, layers=16, heads=16)  # half a billion
TRAINED = ("minilm", "llama", "llama-bf16", "vit", "experts")
SHAPES = {"32 x 128": (32, 128), "8 x 32": (8, 32), "1 x 32": (1, 32)}  # rows x tokens
RUNS = 30  # of a session, in each round
PROGRAM = [sys.executable, "-m", "lora_export"]
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out, device = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).to(device)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""

Feeds = dict[str, np.ndarray]


def card() -> str:
    import torch

    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "no GPU"
    return f"{name}, onnxruntime {ort.__version__}. {machine()}"


def test_a_merge_on_the_gpu(tmp_path: Path) -> None:
    base, made, out = llama(tmp_path / "base", MERGED), adapter(tmp_path / "adapter", shape=MERGED), tmp_path / "out"
    size = sum(path.stat().st_size for path in base.iterdir())

    def settled() -> None:
        shutil.rmtree(out, ignore_errors=True)
        settle(tmp_path, size)

    def ours(*options: str, **variables: str) -> Run:
        return run([*PROGRAM, "merge", base, made, "-o", out, *options], **variables)

    copy = "`cp -r` and `sync`"
    rivals = {
        copy: lambda: run(["cp", "-r", base, out], ["sync"]),
        "lora-export merge": ours,
        f"lora-export merge --device {DEVICE}": lambda: ours("--device", DEVICE),
        f"PEFT on {DEVICE}": lambda: run([sys.executable, "-c", PEFT, base, made, out, DEVICE]),
    }
    if Path(COMPILED["PYTHONPATH"]).is_dir():
        rivals["lora-export merge, compiled"] = lambda: ours(**COMPILED)
    results = side_by_side(rivals, settled, ROUNDS)
    keep("GPU, merge", f"{table(results, copy)}\n\n{ROUNDS} rounds. {card()}")


def test_a_proof_on_the_gpu(tmp_path: Path) -> None:
    base, made = llama(tmp_path / "base", PROVEN), adapter(tmp_path / "adapter", shape=PROVEN)
    graph = tmp_path / "graph" / "model.onnx"
    graph.parent.mkdir()
    run([*PROGRAM, "onnx", base, "-a", made, "-o", graph, "--no-verify"])

    def proof(provider: str) -> Callable[[], Run]:
        line = [*PROGRAM, "verify", graph, "--model", base, "-a", made, "--provider", provider]
        return lambda: run(line)

    results = side_by_side({f"verify --provider {name}": proof(name) for name in ("cpu", DEVICE)}, lambda: None, ROUNDS)
    keep("GPU, proof", f"{table(results, 'verify --provider cpu')}\n\n{ROUNDS} rounds. {card()}")


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_step_on_the_gpu(name: str) -> None:
    found = beside_peft(name, DEVICE)
    steps = len(found.steps["PEFT"].wall)
    keep(f"GPU, training step, {name}", f"{found.table('wall')}\n\n{steps} steps each, memory of tensors. {card()}")


def test_adapters_beside_the_weights_on_the_gpu(tmp_path: Path) -> None:
    """A graph of MiniLM in each mode, and the outputs of all are compared."""
    made, programs = minilm.adapter(tmp_path / "adapter"), {}
    for mode in ("merged", "nodes", "inputs", "rows"):
        folder = tmp_path / mode
        folder.mkdir()
        le.export_onnx(minilm.BASE, folder / "model.onnx", adapters=made, lora=mode, verify=False)
        programs[mode] = program(folder / "model.onnx")
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(ROUNDS):
        for shape, (rows, tokens) in SHAPES.items():
            ids = np.random.default_rng(0).integers(1000, 20000, (rows, tokens))
            feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
            answers = {}
            for mode, runs in programs.items():
                seconds, answers[mode] = timed(runs, feeds)
                times.setdefault((mode, shape), []).append(seconds)
            for answer in answers.values():
                np.testing.assert_allclose(answer, answers["merged"], rtol=1e-2, atol=1e-2)
    keep("GPU, beside the weights", f"{milliseconds(times, [*programs])}\n\n{ROUNDS} rounds. {card()}")


def program(graph: Path) -> Callable[[Feeds], Any]:
    """What runs a graph with its adapter, and returns its first output."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(graph), options, providers=[PROVIDERS[DEVICE]])
    output = session.get_outputs()[0].name
    if graph.parent.name == "inputs":
        held = {"adapter": graph.with_name("adapter.onnx_adapter")}
        served = le.Session(graph, held, provider=DEVICE, session=session)
        return lambda feeds: served.run(feeds, adapter="adapter")[output]
    chosen = {value.name for value in session.get_inputs()} & {"adapter_ids"}

    def runs(feeds: Feeds) -> Any:
        ids = {name: np.ones(len(feeds["input_ids"]), np.int64) for name in chosen}
        return session.run([output], feeds | ids)[0]

    return runs


def timed(runs: Callable[[Feeds], Any], feeds: Feeds) -> tuple[float, Any]:
    """The median of the runs, and the output. The first run fetches memory and chooses kernels."""
    answer, seconds = runs(feeds), []
    for _ in range(RUNS):
        begun = time.perf_counter()
        runs(feeds)
        seconds.append(time.perf_counter() - begun)
    return median(seconds), answer


def milliseconds(times: Mapping[tuple[str, str], list[float]], modes: list[str]) -> str:
    lines = [f"| milliseconds (times merged) | {' | '.join(SHAPES)} |", "|---|" + "---|" * len(SHAPES)]
    for mode in modes:
        pairs = [(times[mode, shape], times["merged", shape]) for shape in SHAPES]
        cells = [
            f"{1000 * median(own):.2f} ({median(a / b for a, b in zip(own, its, strict=True)):.2f})"
            for own, its in pairs
        ]
        lines.append(f"| {mode} | {' | '.join(cells)} |")
    return "\n".join(lines)
