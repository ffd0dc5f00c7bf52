"""What litgpt's layers are called in Hugging Face's models, by family, as litgpt's own conversion has it.

Facts from litgpt 0.5.13, litgpt/scripts/convert_lit_checkpoint.py. litgpt has one layer for q, k and v, in this order.
A family has three layers for them, one in the same order, or one in which they alternate by query group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from lora_export.errors import InputRefused


class QkvForm(Enum):
    """How a family stores q, k and v."""

    SPLIT = "three layers"
    FUSED = "one layer, in the same order"
    ALTERNATING = "one layer, alternating by query group"


@dataclass(frozen=True)
class NamesOfFamily:
    """The names of a family's layers. `{}` is the number of the layer, then that of the expert."""

    layers: Mapping[str, str]  # litgpt's name within a layer -> the name in the model
    qkv: tuple[str, ...]
    form: QkvForm = QkvForm.SPLIT
    head: str = "lm_head"
    gate_up: str = ""  # the one layer for fc_1 and fc_2, where the family has one
    experts: Mapping[str, str] = field(default_factory=dict)


_ATTENTION = "model.layers.{}.self_attn."
_QKV = tuple(f"{_ATTENTION}{each}_proj" for each in "qkv")
_LLAMA_LAYERS = {
    "attn.proj": f"{_ATTENTION}o_proj",
    "mlp.fc_1": "model.layers.{}.mlp.gate_proj",
    "mlp.fc_2": "model.layers.{}.mlp.up_proj",
    "mlp.proj": "model.layers.{}.mlp.down_proj",
}
_LLAMA = NamesOfFamily(_LLAMA_LAYERS, _QKV)
_MIXTRAL = NamesOfFamily(
    {"attn.proj": f"{_ATTENTION}o_proj", "mlp.gate": "model.layers.{}.block_sparse_moe.gate"},
    _QKV,
    experts={
        name: f"model.layers.{{}}.block_sparse_moe.experts.{{}}.{own}"
        for name, own in (("fc_1", "w1"), ("fc_2", "w3"), ("proj", "w2"))
    },
)
_QWEN3_MOE = NamesOfFamily(
    {"attn.proj": f"{_ATTENTION}o_proj", "mlp.gate": "model.layers.{}.mlp.gate"},
    _QKV,
    experts={
        name: f"model.layers.{{}}.mlp.experts.{{}}.{own}_proj"
        for name, own in (("fc_1", "gate"), ("fc_2", "up"), ("proj", "down"))
    },
)
_PHI = NamesOfFamily(
    {
        "attn.proj": f"{_ATTENTION}dense",
        "mlp.fc": "model.layers.{}.mlp.fc1",
        "mlp.proj": "model.layers.{}.mlp.fc2",
    },
    _QKV,
)
_PHI_3 = NamesOfFamily(
    {"attn.proj": f"{_ATTENTION}o_proj", "mlp.proj": "model.layers.{}.mlp.down_proj"},
    (f"{_ATTENTION}qkv_proj",),
    QkvForm.FUSED,
    gate_up="model.layers.{}.mlp.gate_up_proj",
)
_FALCON = NamesOfFamily(
    {
        "attn.proj": "transformer.h.{}.self_attention.dense",
        "mlp.fc": "transformer.h.{}.mlp.dense_h_to_4h",
        "mlp.proj": "transformer.h.{}.mlp.dense_4h_to_h",
    },
    ("transformer.h.{}.self_attention.query_key_value",),
    QkvForm.ALTERNATING,
)
_GPT_NEOX = NamesOfFamily(
    {
        "attn.proj": "gpt_neox.layers.{}.attention.dense",
        "mlp.fc": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
        "mlp.proj": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    },
    ("gpt_neox.layers.{}.attention.query_key_value",),
    QkvForm.ALTERNATING,
    head="embed_out",
)


def names_of_family(name: str, mlp_class: str) -> NamesOfFamily:
    """The names for a model of litgpt, by its `name` and `mlp_class_name`. Raises InputRefused for others."""
    lower = name.lower()
    if "falcon" in lower and mlp_class == "GptNeoxMLP":
        return _FALCON
    if lower.startswith("phi"):
        return _PHI_3 if lower.startswith(("phi-3", "phi-4")) else _PHI
    if mlp_class == "LLaMAMoE":
        return _QWEN3_MOE if lower.startswith("qwen3") else _MIXTRAL
    families = {"LLaMAMLP": _LLAMA, "GemmaMLP": _LLAMA, "GptNeoxMLP": _GPT_NEOX}
    if mlp_class not in families:
        raise InputRefused(
            f"litgpt's model {name!r} has mlp_class_name {mlp_class!r}, and litgpt has no conversion of it to Hugging "
            "Face's names"
        )
    return families[mlp_class]
