"""What a merge costs beside the copy that it cannot avoid, and beside PEFT and mergekit.

The base has the shape of a Llama of 1.1 billion parameters in bf16 (2.2 GB, four shards, random weights). Needs
10 GB of disk. `--device cuda` is measured too where there is a GPU. mergekit wants other versions of its libraries:
name its program by MERGEKIT=/path/to/mergekit-yaml.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from benchmarks.measure import Run, keep, machine, ratio, run, settle, side_by_side, table
from lora_export.storage import safetensors_file

RUNS, RUNS_OF_PEERS = 5, 3
HIDDEN, INNER, LAYERS, WORDS, KEYS = 2048, 5632, 22, 32000, 256
LINEAR = {
    **{
        f"self_attn.{name}_proj": (size, HIDDEN)
        for name, size in zip("qkvo", (HIDDEN, KEYS, KEYS, HIDDEN), strict=True)
    },
    **{f"mlp.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up")},
    "mlp.down_proj": (HIDDEN, INNER),
}
TARGETS = {"all linear": list(LINEAR), "q and v": ["self_attn.q_proj", "self_attn.v_proj"]}
PEFT_NAME = "PEFT merge_and_unload and save_pretrained"
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def shapes() -> dict[str, tuple[int, ...]]:
    layer = {f"{name}.weight": shape for name, shape in LINEAR.items()}
    layer |= {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}
    layers = {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()}
    ends = {"model.norm.weight": (HIDDEN,), "lm_head.weight": (WORDS, HIDDEN)}
    return {"model.embed_tokens.weight": (WORDS, HIDDEN), **layers, **ends}


def llama(folder: Path, shards: int = 4) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    every, index = shapes(), {}
    for number, names in enumerate(np.array_split(list(every), shards), 1):
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        tensors = {
            str(name): (0.02 * rng.standard_normal(every[name], np.float32)).astype(ml_dtypes.bfloat16)
            for name in names
        }
        safetensors_file.write(folder / file, tensors, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": WORDS,
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 32,
        "num_key_value_heads": 4, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def adapter(folder: Path, targets: list[str]) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(1)
    tensors = {}
    for layer in range(LAYERS):
        for target in targets:
            rows, columns = LINEAR[target]
            name = f"base_model.model.model.layers.{layer}.{target}"
            tensors[f"{name}.lora_A.weight"] = 0.02 * rng.standard_normal((16, columns), np.float32)
            tensors[f"{name}.lora_B.weight"] = 0.02 * rng.standard_normal((rows, 16), np.float32)
    safetensors_file.write(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


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

    def ours(*options: str) -> Run:
        return run([sys.executable, "-m", "lora_export", "merge", base, made, "-o", out, *options])

    copy = "`cp -r` and `sync`"
    rivals = {
        copy: lambda: run(["cp", "-r", base, out], ["sync"]),
        "lora-export merge": ours,
        "lora-export merge --hash sha256": lambda: ours("--hash", "sha256"),
    }
    if torch.cuda.is_available():
        rivals["lora-export merge --device cuda"] = lambda: ours("--device", "cuda")
    results = side_by_side(rivals, settled, RUNS)
    peers = {
        "lora-export merge": ours,
        PEFT_NAME: lambda: run([sys.executable, "-c", PEFT, base, made, out]),
    }
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
    ours_peak = max(run.peak for run in beside["lora-export merge"])
    assert ours_peak <= 160
    if which == "all linear":
        assert ratio(beside, PEFT_NAME, "lora-export merge") >= 5
        assert min(run.peak for run in beside[PEFT_NAME]) >= 15 * ours_peak
