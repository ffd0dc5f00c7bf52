"""Processor time of proofs on a Llama whose weights are streamed, with an adapter on every linear layer.

The control of single pairs in batches beside one by one, both of which find the same; and a proof as a whole process
beside a further one of another adapter, which has a session. `--loaded-sizes` are in billions of parameters.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.bench_scale import SHAPES, sizes_of
from benchmarks.checkpoints import adapter, llama
from benchmarks.measure import keep, machine
from lora_export import merge
from lora_export.api.load import load_adapters
from lora_export.models.load import load_model
from lora_export.runtime.runner import Arrays
from lora_export.runtime.torch_runners import Fp64Runner
from lora_export.verification import parity
from lora_export.verification.module_copies import widened
from lora_export.verification.references import single_pairs
from lora_export.verification.references.attached_module import attach_adapters
from lora_export.verification.references.single_pairs import control_pairs

ROUNDING = 1e-6  # relative to the largest output: the error that PyTorch and the candidate have here
TOKENS = 5


def case_of(arrays: Arrays) -> parity.Case:
    """A case whose deployed outputs and candidate's have an error as rounding to fp32 makes."""
    rng = np.random.default_rng(0)

    def rounded() -> Arrays:
        return {
            name: (value + ROUNDING * np.abs(value).max() * rng.standard_normal(value.shape)).astype(np.float32)
            for name, value in arrays.items()
        }

    return parity.Case("tokens", "", arrays, rounded(), rounded())


PROOFS = """
import sys, time
import lora_export as le
base, *rest = sys.argv[1:]
session, used = le.ProofSession(), [0.0]
for merged, adapter in zip(rest[::2], rest[1::2]):
    assert le.verify(merged, base, adapters=[adapter], session=session)
    used.append(time.process_time())
print(*(after - before for before, after in zip(used, used[1:])))
"""


def test_a_further_proof_on_the_same_base(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    rows = []
    for size in sizes_of(request.config.getoption("--loaded-sizes")):
        base = llama(tmp_path / f"base {size}", SHAPES[size])
        words: list[Path] = []
        for number in (1, 2):
            merged, made = (tmp_path / f"{name} {number} {size}" for name in ("merged", "adapter"))
            adapter(made, shape=SHAPES[size], seed=number)
            merge(base, [made], output=merged)
            words += [merged, made]
        command = [sys.executable, "-c", PROOFS, *map(str, (base, *words))]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        lone, further = map(float, printed.split())
        rows.append(f"| {size} | {lone:.1f} s | {further:.1f} s | {further / lone:.2f} |")
        print(rows[-1], flush=True)
    head = "| billions of parameters | a proof | a further one | of the first |\n|---|---|---|---|"
    keep("further proofs", "\n".join([head, *rows, "", f"All linear layers, rank 16, merged in bf16. {machine()}"]))


def test_pairs_in_batches(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    for size in sizes_of(request.config.getoption("--loaded-sizes")):
        base, made = tmp_path / f"base {size}", tmp_path / f"adapter {size}"
        llama(base, SHAPES[size])
        adapter(made, shape=SHAPES[size])
        module = attach_adapters(load_model(str(base), streamed=True).module, load_adapters([str(made)]), None)
        tokens = np.random.default_rng(0).integers(0, SHAPES[size].words, (1, TOKENS))
        inputs = {"tokens": {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}}
        seconds, found = [], []
        with widened(module):
            case = case_of(Fp64Runner(module).run(inputs["tokens"]))
            judge = functools.partial(parity.judge_missing_part, [case], dtype="float32")
            for largest in (single_pairs.LARGEST_BATCH, 1):
                monkeypatch.setattr(single_pairs, "LARGEST_BATCH", largest)
                begun = time.process_time()
                found.append(control_pairs(module, inputs, [case], judge))
                seconds.append(time.process_time() - begun)
            monkeypatch.undo()
        assert found[0] == found[1] and found[0].names
        rows.append(f"| {size} | {len(found[0].names)} | {seconds[0]:.1f} s | {seconds[1]:.1f} s |")
        print(rows[-1], flush=True)
    head = "| billions of parameters | pairs, or layers | in batches | one by one |\n|---|---|---|---|"
    keep("pairs", "\n".join([head, *rows, "", f"One case of {TOKENS} tokens, rank 16. {machine()}"]))
