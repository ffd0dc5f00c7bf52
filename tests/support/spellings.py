"""Adapters and bases whose names are of different generations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_export import plan
from lora_export.lora import LoraPair
from lora_export.names.architecture import rules_of
from lora_export.plan import Layout
from support.plans import matrix, pair, vector

VIT = rules_of({"model_type": "vit", "architectures": ["ViTForImageClassification"]})
NOMIC = rules_of({"model_type": "nomic_bert", "architectures": ["NomicBertModel"]})
MIXTRAL = rules_of({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]})
LARA = rules_of({"model_type": "lara_mini", "architectures": ["LaraMiniForCausalLM"]})
KIMI = rules_of({"model_type": "kimi_k25", "architectures": ["KimiK25ForConditionalGeneration"]})

OLD = [f"vit.encoder.layer.{n}.attention.attention.{name}" for n in range(2) for name in ("query", "value")]
NEW = [f"vit.layers.{n}.attention.{name}" for n in range(2) for name in ("q_proj", "v_proj")]
EXPERTS = "model.layers.0.block_sparse_moe.experts"
QKV = "encoder.layers.0.attn.Wqkv"


def numbered(modules: Sequence[str], **fields: Any) -> dict[str, LoraPair]:
    """A pair of its own for each module."""
    return {module: pair(scale=number, **fields) for number, module in enumerate(modules, 1)}


def base(modules: Sequence[str]) -> list:
    return [matrix(f"{module}.weight") for module in modules]


def filled(rank: int, out: int, in_: int, *, seed: int = 0, **fields: Any) -> LoraPair:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(-4, 5, (rank, in_)), rng.integers(-4, 5, (out, rank))
    return LoraPair(a=a.astype(np.float32), b=b.astype(np.float32), scale=1.0, **fields)


def fused(out: int = 6, in_: int = 4) -> list:
    return [matrix(f"{QKV}.weight", out, in_), vector(f"{QKV}.bias", out), vector("other", 3)]


def experts(count: int = 3, *, inner: int = 2, width: int = 4) -> tuple[dict[str, LoraPair], list]:
    """Pairs for each expert of Mixtral, and the stacked tensors of the loaded model."""
    pairs = {}
    for number in range(count):
        for name, (out, in_) in {"w1": (inner, width), "w2": (width, inner), "w3": (inner, width)}.items():
            pairs[f"{EXPERTS}.{number}.{name}"] = filled(1, out, in_, seed=len(pairs))
    stacked = [
        plan.TensorSpec(f"model.layers.0.mlp.experts.{name}", (count, *shape), "float32", Layout.OUT_IN)
        for name, shape in {"gate_up_proj": (2 * inner, width), "down_proj": (width, inner)}.items()
    ]
    return pairs, stacked
