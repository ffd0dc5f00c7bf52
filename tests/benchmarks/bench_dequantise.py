"""A merge into a base in nf4 beside a merge into the float base that it was made from, as whole processes."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from bitsandbytes import functional
from safetensors.torch import save_file

from benchmarks.measure import keep, machine, run, settle, side_by_side, table

HIDDEN, INNER, LAYERS, RANK, WORDS = 2048, 5632, 16, 16, 32000
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (512, HIDDEN), "self_attn.v_proj": (512, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
    "intermediate_size": INNER, "num_hidden_layers": LAYERS, "vocab_size": WORDS, "dtype": "bfloat16",
    "tie_word_embeddings": False,
}  # fmt: skip
RUNS = 5
ALL = ("--min-retention", "0")  # every layer stays in nf4
FLOATS, NF4, KEPT = "merge into floats", "merge --dequantize into nf4", "merge --keep-quantised into nf4"


def save(folder: Path, tensors: Mapping[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir()
    others = {"model.norm.weight": torch.ones(HIDDEN).bfloat16()}
    others |= {
        name: (torch.randn(WORDS, HIDDEN) * 0.02).bfloat16() for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    save_file({**tensors, **others}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    return folder


def bases_and_adapter(folder: Path) -> tuple[Path, Path, Path]:
    """0.85 B parameters in bf16, the same linear layers in nf4, and an adapter for all of them."""
    torch.manual_seed(0)
    floats, packed, adapter = {}, {}, {}
    for name, shape in SHAPES.items():
        weight = (torch.randn(shape) * 0.02).bfloat16()
        numbers, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=64)
        parts = {f".{part}": value for part, value in state.as_dict(packed=True).items()}
        for layer in range(LAYERS):
            module = f"model.layers.{layer}.{name}"
            floats[f"{module}.weight"] = weight.clone()
            packed |= {f"{module}.weight{part}": value.clone() for part, value in {"": numbers, **parts}.items()}
            adapter[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, shape[1]) * 0.02
            adapter[f"base_model.model.{module}.lora_B.weight"] = torch.randn(shape[0], RANK) * 0.02
    (folder / "adapter").mkdir()
    save_file(adapter, folder / "adapter" / "adapter_model.safetensors")
    targets = sorted(name.partition(".")[2] for name in SHAPES)
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(fields))
    scheme = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    quantised = save(folder / "nf4", packed, quantization_config=scheme)
    return save(folder / "floats", floats), quantised, folder / "adapter"


def test_nf4_costs_little_more_than_floats(tmp_path: Path) -> None:
    floats, quantised, adapter = bases_and_adapter(tmp_path)
    out = tmp_path / "out"
    merge = [sys.executable, "-m", "lora_export", "merge"]

    def settled() -> None:
        shutil.rmtree(out, ignore_errors=True)
        settle(tmp_path, 1 << 30)

    rivals = {
        FLOATS: functools.partial(run, [*merge, floats, adapter, "-o", out]),
        NF4: functools.partial(run, [*merge, quantised, adapter, "-o", out, "--dequantize"]),
        KEPT: functools.partial(run, [*merge, quantised, adapter, "-o", out, "--keep-quantised", *ALL]),
    }
    results = side_by_side(rivals, settled, RUNS)
    keep("merge into nf4", f"{table(results, FLOATS)}\n\n{RUNS} rounds. {machine()}")
