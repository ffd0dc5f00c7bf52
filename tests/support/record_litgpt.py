"""Records what litgpt merges, in Hugging Face's names: `python record_litgpt.py litgpt_examples.json`, with litgpt 0.5.

litgpt needs an older huggingface_hub than transformers 5, so that the tests do not install it. Weights of the bases are
zero and factors are small integers: the merged weights are the changes, exactly.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from litgpt.lora import GPT, Config, lora_filter, merge_lora_weights
from litgpt.scripts import convert_lit_checkpoint as conversion

SIZES = {"n_layer": 1, "n_head": 4, "n_embd": 8, "head_size": 2, "n_query_groups": 2, "padded_vocab_size": 8}
LLAMA = {**SIZES, "mlp_class_name": "LLaMAMLP", "intermediate_size": 6, "bias": False}
ALL = {f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp", "head")}
EXAMPLES: dict[str, tuple[dict[str, Any], dict[str, Any], Any]] = {
    "llama": ({"name": "Llama-3", **LLAMA}, ALL, conversion.copy_weights_llama),
    "llama, query and value": (
        {"name": "Llama-3", **LLAMA},
        {"lora_query": True, "lora_value": True},
        conversion.copy_weights_llama,
    ),
    "mixtral": (
        {"name": "Mixtral-8x7B", **LLAMA, "mlp_class_name": "LLaMAMoE", "n_expert": 2, "n_expert_per_token": 1},
        ALL,
        conversion.copy_weights_llama,
    ),
    "qwen3 moe": (
        {"name": "Qwen3-30B", **LLAMA, "mlp_class_name": "LLaMAMoE", "n_expert": 2, "moe_intermediate_size": 6},
        ALL,
        conversion.copy_weights_qwen_3,
    ),
    "pythia": (
        {"name": "pythia-14m", **SIZES, "n_query_groups": 4, "mlp_class_name": "GptNeoxMLP", "intermediate_size": 6},
        ALL,
        conversion.copy_weights_gpt_neox,
    ),
    "falcon, query and key": (
        {"name": "falcon-7b", **SIZES, "mlp_class_name": "GptNeoxMLP", "intermediate_size": 6, "bias": False,
         "shared_attention_norm": True},
        {"lora_query": True, "lora_key": True, "lora_mlp": True},
        conversion.copy_weights_falcon,
    ),
    "phi-2": (
        {"name": "phi-2", **SIZES, "mlp_class_name": "GptNeoxMLP", "intermediate_size": 6,
         "shared_attention_norm": True, "lm_head_bias": True},
        ALL,
        conversion.copy_weights_phi,
    ),
    "phi-3": ({"name": "Phi-3-mini", **LLAMA}, ALL, conversion.copy_weights_phi),
    "gemma-2": (
        {"name": "Gemma-2-2b", **LLAMA, "mlp_class_name": "GemmaMLP"},
        {**ALL, "lora_head": False},
        conversion.copy_weights_gemma_2,
    ),
}  # fmt: skip


def recorded(config: dict[str, Any], enabled: dict[str, Any], copy: Any) -> dict[str, Any]:
    """The settings, the adapter's tensors and what they change, as nested lists of integers."""
    settings = {"lora_r": 2, "lora_alpha": 4, **enabled}
    full = Config(**config, **settings)
    model = GPT(full)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data.zero_()
        if "lora_" in name:
            parameter.data = torch.randint(-2, 3, parameter.shape).float()
    tensors = {name: value.int().tolist() for name, value in model.state_dict().items() if lora_filter(name, value)}
    merge_lora_weights(model)
    merged = {n.replace("linear.", ""): v for n, v in model.state_dict().items() if not lora_filter(n, v)}
    converted: dict[str, torch.Tensor] = {}
    copy(full, converted, {name: value for name, value in merged.items() if "norm" not in name and "ln_f" not in name})
    changes = {name: value.int().tolist() for name, value in converted.items() if value.any()}
    return {"config": config, "settings": settings, "tensors": tensors, "changes": changes}


if __name__ == "__main__":
    found = {name: recorded(*example) for name, example in EXAMPLES.items()}
    Path(sys.argv[1]).write_text(json.dumps(found, separators=(",", ":")) + "\n")
