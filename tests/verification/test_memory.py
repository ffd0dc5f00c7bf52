"""The memory that a proof takes: the model in fp64, and one copy of the candidate."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_export import cli
from support import peak
from support.handmade import peft_adapter

SLACK = 0.15  # of the model in fp32: activations and the like
OPEN_CANDIDATE = (
    "import sys, pathlib, lora_export.runtime.onnx_runner as runner; runner.OnnxRunner(pathlib.Path(sys.argv[1]))"
)


def a_base(folder: Path, width: int) -> int:
    """A Llama and an adapter for it; returns the MiB that it takes in fp32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2000, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    module = LlamaForCausalLM(config)
    module.save_pretrained(folder / "base")
    rng = np.random.default_rng(0)
    layers = [f"model.layers.{number}.self_attn.{part}_proj" for number in range(4) for part in "qv"]
    peft_adapter(
        folder / "adapter",
        {name: (rng.normal(size=(4, width)) / 16, rng.normal(size=(width, 4)) / 16) for name in layers},
    )
    return sum(parameter.numel() for parameter in module.parameters()) * 4 // 2**20


def measured(*line: object) -> float:
    run = peak.run([sys.executable, *line])
    assert run.code == 0
    return run.peak


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["merged", "merged.onnx"])
def test_proof_takes_memory_for_one_fp64_model_and_the_candidate(kind: str, tmp_path: Path) -> None:
    peaks, own, size = [], [], 0
    for width in (32, 1024):
        folder = tmp_path / str(width)
        folder.mkdir()
        size = a_base(folder, width)
        base, adapter, candidate = folder / "base", folder / "adapter", folder / kind
        made = ["onnx", base, "-a", adapter, "--no-verify"] if kind.endswith(".onnx") else ["merge", base, adapter]
        assert cli.run([*map(str, made), "-o", str(candidate)]) == 0
        peaks.append(measured("-m", "lora_export", "verify", candidate, "--model", base, "-a", adapter))
        own.append(measured("-c", OPEN_CANDIDATE, candidate) if kind.endswith(".onnx") else size)
    taken, holds = peaks[1] - peaks[0], own[1] - own[0]
    print(f"{kind}: {taken:.0f} MiB for a model of {size} MiB in fp32 and a candidate that takes {holds:.0f}")
    assert taken > 2 * size  # otherwise nothing was measured
    assert taken <= (2 + SLACK) * size + holds
