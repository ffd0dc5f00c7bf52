"""Processor time of the control of single pairs: in batches beside one by one, on a Llama whose weights are streamed.

`--loaded-sizes` are the sizes in billions of parameters. Both find the same.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.bench_scale import SHAPES, sizes_of
from benchmarks.checkpoints import adapter, llama
from benchmarks.measure import keep, machine
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
