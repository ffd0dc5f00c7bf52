"""Tiny models with experts, each with an adapter that PEFT trained on its stacked parameters."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedModel

from lora_export import layers
from lora_export.lora import Adapter, LoraPair, expert_name

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
COUNT, RANK = 4, 2

# model type -> its class, its sizes, and the attention's module that the adapter changes too
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "mixtral": ("Mixtral", {"intermediate_size": 24, "num_local_experts": COUNT}, "q_proj"),
    "qwen3_moe": ("Qwen3Moe", {"moe_intermediate_size": 8, "num_experts": COUNT}, "q_proj"),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "moe_intermediate_size": 8,
            "n_routed_experts": COUNT,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "num_key_value_heads": 2,
            "head_dim": 4,
        },
        "o_proj",
    ),
    # Each expert's down_proj is a square matrix.
    "gpt_oss": ("GptOss", {"intermediate_size": 16, "num_local_experts": COUNT}, "q_proj"),
    "llama4_text": (
        "Llama4",
        {"intermediate_size": 16, "intermediate_size_mlp": 24, "num_local_experts": COUNT, "num_experts_per_tok": 1},
        "q_proj",
    ),
    "olmoe": ("Olmoe", {"intermediate_size": 24, "num_experts": COUNT}, "q_proj"),
    "granitemoe": ("GraniteMoe", {"intermediate_size": 24, "num_local_experts": COUNT}, "q_proj"),
}
_ROUTED = {"moe_intermediate_size": 8, "n_routed_experts": COUNT, "n_shared_experts": 1, "first_k_dense_replace": 1}
_GROUPED = _ROUTED | {"n_group": 1, "topk_group": 1, "num_hidden_layers": 2}
# Families for which PEFT's `all-linear` names experts and routers in `target_parameters`: class, and words -> its sizes
ALL_LINEAR: dict[str, dict[str, Any]] = {
    **{MODELS[name][0]: MODELS[name][1] for name in ("mixtral", "qwen3_moe", "deepseek_v3", "olmoe")},
    "DeepseekV2": MODELS["deepseek_v3"][1] | {"n_shared_experts": 1},
    "FlexOlmo": MODELS["olmoe"][1],
    "Glm4Moe": _GROUPED,
    "Glm4Moe without experts": _GROUPED | {"first_k_dense_replace": 2},  # a dense layer has a down_proj of its own
    "Dots1": _GROUPED,
    "Ernie4_5_Moe": {
        "moe_intermediate_size": 8,
        "moe_num_experts": COUNT,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "num_hidden_layers": 2,
    },
    "MiniMax": MODELS["mixtral"][1] | {"num_hidden_layers": 2},
    "Qwen3Next": {
        "moe_intermediate_size": 8,
        "num_experts": COUNT,
        "shared_expert_intermediate_size": 8,
        **{f"linear_num_{kind}_heads": 2 for kind in ("key", "value")},
        **{f"linear_{kind}_head_dim": 8 for kind in ("key", "value")},
        "num_hidden_layers": 4,
    },
}


def tiny_model(name: str, **sizes: Any) -> PreTrainedModel:
    """A causal model of this type with random weights."""
    prefix, own, _ = MODELS[name]
    text = "Text" if name == "llama4_text" else ""
    config = getattr(transformers, f"{prefix}{text}Config")(**{**SIZES, **own, **sizes})
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, f"{prefix}ForCausalLM")(config)
    return model.eval()


def peft_model(name: str, model: PreTrainedModel, **options: Any) -> peft.PeftModel:
    """A copy of the model with LoRA on its experts and its attention. No factor is zero."""
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(
        target_modules=[MODELS[name][2]],
        target_parameters=options.pop("target_parameters", parameters),
        init_lora_weights=False,
        **{"r": RANK, "lora_alpha": 6, **options},
    )
    torch.manual_seed(1)
    return peft.get_peft_model(copy.deepcopy(model), config).eval()


def save(folder: Path, name: str, **options: Any) -> Mapping[str, Path]:
    """Save `old` and `new` (the base in both spellings), the adapter, and `merged_old` and `merged_new` by PEFT."""
    model = tiny_model(name)
    wrapped = peft_model(name, model, **options)
    paths = {key: folder / key for key in ("old", "new", "adapter", "merged_old", "merged_new")}
    model.save_pretrained(paths["old"])
    model.save_pretrained(paths["new"], save_original_format=False)
    wrapped.save_pretrained(paths["adapter"])
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(paths["merged_old"])
    merged.save_pretrained(paths["merged_new"], save_original_format=False)
    return paths


def rewritten(adapter: Path, folder: Path, change: Any, **config: Any) -> Path:
    """A copy of an adapter with changed tensors, and with these fields of its config. None removes a field."""
    folder.mkdir()
    save_file(change(load_file(adapter / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
    fields = json.loads((adapter / "adapter_config.json").read_text())
    fields = {key: value for key, value in (fields | config).items() if key not in config or value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def weights(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of a folder with one file."""
    return load_file(folder / "model.safetensors")


def parts_of(tensors: Mapping[str, np.ndarray[Any, Any]], layer: str) -> dict[str, tuple[np.ndarray[Any, Any], ...]]:
    """The flat A and B of gate_up_proj and down_proj of one module of experts, as A (E, r, in) and B (E, out, r)."""
    found = {}
    for name, inner in (("gate_up_proj", ".base_layer"), ("down_proj", "")):
        a, b = (tensors[f"{layer}{inner}.lora_{side}.weight"] for side in "AB")
        found[name] = (a.reshape(COUNT, RANK, -1), np.moveaxis(b.reshape(-1, RANK, COUNT), 2, 0))
    return found


PROJECTIONS = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}  # Mixtral's


def of_single_experts(adapter: Path, folder: Path, kept: Collection[str] = ()) -> Path:
    """An adapter of a Mixtral as transformers 4 named its experts. The factors are those of the stacked adapter.

    `kept` are those that it has, such as `1.w3`; empty: all.
    """
    kept = kept or [f"{expert}.{name}" for expert in range(COUNT) for own in PROJECTIONS.values() for name in own]
    moe = "layers.0.block_sparse_moe.experts"

    def apart(tensors: dict[str, Any]) -> dict[str, Any]:
        found = {key: value for key, value in tensors.items() if "experts" not in key}
        for parameter, (a, b) in parts_of(tensors, "base_model.model.model.layers.0.mlp.experts").items():
            rows = b.shape[1] // len(PROJECTIONS[parameter])
            for name in kept:
                expert, projection = name.split(".")
                if projection in PROJECTIONS[parameter]:
                    first = PROJECTIONS[parameter].index(projection) * rows
                    owner = f"base_model.model.model.{moe}.{name}"
                    found[f"{owner}.lora_A.weight"] = a[int(expert)].copy()
                    found[f"{owner}.lora_B.weight"] = b[int(expert), first : first + rows].copy()
        return found

    targets = ["q_proj", *(f"{moe}.{name}" for name in kept)]
    return rewritten(adapter, folder, apart, target_modules=targets, target_parameters=None)


def experts_adapter(model: torch.nn.Module) -> Adapter:
    """Pairs for every expert of both parameters, in fp32 and as stored."""
    rng = torch.Generator().manual_seed(2)
    pairs = {}
    for spec in layers.specs(model):
        for expert in range(spec.shape[0]) if len(spec.shape) == 3 else ():
            out, in_ = spec.shape[1:]
            a, b = (torch.randn(size, generator=rng).numpy() for size in ((2, in_), (out, 2)))
            pairs[expert_name(spec.name, expert)] = LoraPair(a=a, b=b, scale=0.5, as_stored=True)
    return Adapter("ad", "peft", pairs)


def gates_of(model: torch.nn.Module) -> Adapter:
    """Pairs for the gates, which are half of the rows, of some experts."""
    (pairs, whole), wanted = ({}, experts_adapter(model).pairs), (2, 0)
    for name, pair in whole.items():
        path, _, expert = name.removesuffix("]").rpartition("[")
        if path.endswith("gate_up_proj") and int(expert) in wanted:
            half = len(pair.b) // 2
            pairs[f"{path}[{expert}, 0:{half}]"] = dataclasses.replace(pair, b=pair.b[:half])
    return Adapter("gates", "peft", pairs)


def some_experts_of(model: torch.nn.Module) -> Adapter:
    adapter = experts_adapter(model)
    return dataclasses.replace(adapter, name="some", pairs=dict(list(adapter.pairs.items())[1::2]))
