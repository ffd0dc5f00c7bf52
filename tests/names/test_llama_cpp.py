"""Names of llama.cpp: as the package gguf maps those of transformers, and as transformers' own models have them."""

from __future__ import annotations

import gguf
import pytest
import torch
import transformers as hf

from lora_export.errors import InputRefused
from lora_export.names.families import EXPERT
from lora_export.names.llama_cpp import LLAMA_CPP_NAMES, LLAMA_CPP_TYPES, LlamaCppNames, model_type_of
from lora_export.names.row_orders import Heads, RowOrder

SMALL = {
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "vocab_size": 64, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1, "pad_token_id": 0,
    "num_local_experts": 2, "num_experts": 2, "shared_expert_intermediate_size": 32,
}  # fmt: skip
ARCHITECTURES = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
# Mixtral's files have the names of transformers 4, and its loaded model those of 5.
OF_FILES = {"mlp.gate.": "block_sparse_moe.gate."}


def names_of(kind: str) -> LlamaCppNames:
    return LlamaCppNames(kind, Heads(4, 2))


@pytest.mark.parametrize("kind", LLAMA_CPP_TYPES)
def test_each_tensor_of_a_model_comes_back(kind: str) -> None:
    config = hf.AutoConfig.for_model(kind)
    for name, value in SMALL.items():
        if hasattr(config, name):
            setattr(config, name, value)
    config.layer_types = config.layer_types[:1] if getattr(config, "layer_types", None) else None
    names = names_of(kind)
    with torch.device("meta"):
        model = getattr(hf, names.class_name)(config)
    theirs = gguf.get_tensor_name_map(ARCHITECTURES[LLAMA_CPP_TYPES[kind]["architecture"]], 1)
    checked = 0
    for tensor in model.state_dict():
        own = theirs.get_name(tensor, (".weight", ".bias"))
        if ".experts." in tensor or own is None:  # stacked in memory; gemma's head is always tied
            continue
        wanted = tensor
        for loaded, stored in OF_FILES.items() if kind == "mixtral" else ():
            wanted = wanted.replace(loaded, stored)
        assert names.of_transformers(own) == wanted
        checked += 1
    assert checked >= 9


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_stacked_experts_have_the_names_of_files(kind: str) -> None:
    theirs = gguf.get_tensor_name_map(ARCHITECTURES[LLAMA_CPP_TYPES[kind]["architecture"]], 1)
    for part in ("gate", "up", "down"):
        found = names_of(kind).of_transformers(f"blk.0.ffn_{part}_exps.weight")
        assert found is not None and EXPERT in found
        stacked = found.replace(f".{EXPERT}.", ".").removesuffix(".weight")
        assert theirs.get_name(stacked) == f"blk.0.ffn_{part}_exps"


def test_an_architecture_is_that_of_a_type() -> None:
    assert [model_type_of("llama", has_experts=each) for each in (False, True)] == ["llama", "mixtral"]
    assert model_type_of("gemma3", has_experts=False) == "gemma3_text"
    with pytest.raises(InputRefused) as refused:
        model_type_of("mamba", has_experts=False)
    assert "architecture 'mamba' are not supported; supported: bert, gemma, gemma2" in str(refused.value)


@pytest.mark.parametrize(
    "name", ["rope_freqs.weight", "blk.0.attn_q", "blk.x.attn_q.weight", "blk.0.attn_q.scale", "token_embd"]
)
def test_other_names_have_none_in_transformers(name: str) -> None:
    assert names_of("llama").of_transformers(name) is None


def test_only_queries_and_keys_of_llama_are_reordered() -> None:
    found = {
        (kind, name): names_of(kind).row_order(f"model.layers.0.self_attn.{name}")
        for kind in ("llama", "qwen2")
        for name in ("q_proj.weight", "k_proj.bias", "v_proj.weight")
    }
    assert {key: order for key, order in found.items() if order} == {
        ("llama", "q_proj.weight"): RowOrder.PAIRS_OF_QUERIES,
        ("llama", "k_proj.bias"): RowOrder.PAIRS_OF_KEYS,
    }
    assert [kind for kind in LLAMA_CPP_TYPES if names_of(kind).shifts_norms] == ["gemma", "gemma2", "gemma3_text"]
    assert (
        len(set(LLAMA_CPP_NAMES.values())) == len(LLAMA_CPP_NAMES) - 1
    )  # two architectures have one norm each in the same place
