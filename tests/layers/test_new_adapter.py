"""New adapters for a module."""

from __future__ import annotations

from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from numpy.typing import NDArray
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from lora_export import layers
from lora_export.errors import InputRefused
from support.small_layers import TARGETS, Everything, a_linear, a_model, an_encoder_layer, base_of, equal, plan_for


def a_classifier() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=11, num_labels=3
    )
    return BertForSequenceClassification(config).eval()


def test_a_new_adapter_changes_nothing_and_trains_its_targets() -> None:
    model = a_classifier()
    tokens = torch.tensor([[1, 2, 3]])
    before = model(tokens).logits
    adapter = layers.create_adapter(
        model, targets=["query", "value"], rank=2, alpha=4, seed=0, modules_to_save=["classifier"], name="fresh"
    )
    attention = [f"bert.encoder.layer.{number}.attention.self" for number in range(2)]
    assert list(adapter.pairs) == [f"{path}.{name}" for path in attention for name in ("query", "value")]
    assert list(adapter.replaced) == ["classifier.weight", "classifier.bias"]
    assert {pair.scale for pair in adapter.pairs.values()} == {2.0}
    assert (adapter.name, adapter.targets) == ("fresh", ("query", "value"))
    assert adapter.metadata == {"r": 2, "lora_alpha": 4, "use_rslora": False}
    layers.attach(model, plan_for(model, adapter, identity_ok=True), trainable=True)
    assert equal(model(tokens).logits, before)
    assert layers.count_parameters(model).trained == 4 * (2 * 8 + 8 * 2) + 3 * 8 + 3


def test_a_is_kaiming_uniform_and_b_is_zero() -> None:
    model = nn.Sequential(nn.Linear(100, 50))
    pair = layers.create_adapter(model, targets=["0"], rank=16, alpha=8, seed=0, rslora=True).pairs["0"]
    assert (pair.a.shape, pair.b.shape, pair.scale) == ((16, 100), (50, 16), 2.0)
    assert 0.099 < np.abs(pair.a).max() <= 0.1
    assert pair.a.std() == pytest.approx(0.1 / np.sqrt(3), rel=0.05)
    assert not pair.b.any()


def test_equal_seeds_give_equal_adapters() -> None:
    def first(seed: int) -> NDArray[np.float32]:
        return layers.create_adapter(a_model(), targets="all-linear", rank=1, alpha=1, seed=seed).pairs["0"].a

    assert (first(1) == first(1)).all()
    assert (first(1) != first(2)).any()


def test_all_linear_includes_packed_attention() -> None:
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(an_encoder_layer(), 1), "head": nn.Linear(8, 3)})
    inner = [f"encoder.layers.0.{key}" for key in TARGETS]
    adapter = layers.create_adapter(model, targets="all-linear", rank=2, alpha=2, seed=0)
    assert list(adapter.pairs) == [*inner, "head"]
    assert {key: pair.shape for key, pair in adapter.pairs.items()} == {
        **{f"encoder.layers.0.{key}": shape for key, shape in TARGETS.items()},
        "head": (3, 8),
    }
    without = layers.create_adapter(model, targets="all-linear", rank=2, alpha=2, seed=0, exclude=["head", "linear1"])
    assert list(without.pairs) == [key for key in inner if not key.endswith("linear1")]
    layers.attach(model, plan_for(model, without, identity_ok=True))


def test_all_linear_leaves_out_the_output_embeddings() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=8))
    adapter = layers.create_adapter(model, targets="all-linear", rank=2, alpha=2, seed=0)
    assert list(adapter.pairs) == [
        f"transformer.h.0.{key}" for key in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert adapter.pairs["transformer.h.0.mlp.c_fc"].shape == (32, 8)
    layers.attach(model, plan_for(model, adapter, identity_ok=True))
    oracle = peft.get_peft_model(
        GPT2LMHeadModel(model.config), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    )
    assert {key.removeprefix("base_model.model.") for key in oracle.targeted_module_names} == set(adapter.pairs)


def test_a_layer_in_a_saved_module_gets_no_pair() -> None:
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))})
    adapter = layers.create_adapter(model, targets="all-linear", rank=1, alpha=1, seed=0, modules_to_save=["head"])
    assert list(adapter.pairs) == ["body"]
    assert list(adapter.replaced) == ["head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"]


def test_a_bare_layer_gets_an_adapter() -> None:
    model = a_linear()
    adapter = layers.create_adapter(model, targets="all-linear", rank=1, alpha=1, seed=0)
    layers.attach(model, plan_for(model, adapter, identity_ok=True), trainable=True)
    assert layers.count_parameters(model).trained == 5


def test_convolutions_and_embeddings_are_no_linear_targets():
    base = base_of(Everything)
    fresh = layers.create_adapter(base, targets="all-linear", rank=1, alpha=1, seed=0)
    assert fresh.pairs.keys() == {"fc", "fan"}
    for target in ("words", "one"):
        with pytest.raises(InputRefused, match=f"`{target}` is no linear layer"):
            layers.create_adapter(base, targets=[target], rank=1, alpha=1, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["qurey"]}, r"`qurey` matches no linear layer; the nearest: query"),
        ({"targets": ["embeddings"]}, r"`embeddings` is no linear layer; the nearest: "),
        (
            {"targets": ["query"], "modules_to_save": ["classifer"]},
            r"`classifer` matches no module; the nearest: classifier",
        ),
        ({"targets": "all-linear", "exclude": ["dense2"]}, r"`dense2` matches no module; the nearest: dense"),
        ({"targets": ["a", "b"]}, r"`a` matches no linear layer.*; `b` matches no linear layer"),
        ({"targets": ["classifier"], "modules_to_save": ["classifier"]}, "no linear layer is left to adapt"),
        ({"targets": ["query"], "rank": 0}, "rank 0 and alpha 1: both must be positive"),
        ({"targets": ["query"], "alpha": float("nan")}, "rank 1 and alpha nan: both must be positive"),
    ],
)
def test_names_that_match_nothing_are_refused_with_the_nearest(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        layers.create_adapter(a_classifier(), **{"rank": 1, "alpha": 1, "seed": 0, **options})


def test_layers_that_are_smaller_than_the_rank_are_found() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    fitting, beyond = (
        layers.create_adapter(module, targets="all-linear", rank=rank, alpha=4, seed=0) for rank in (3, 4)
    )
    assert layers.full_rank_layers(fitting) == []
    assert layers.full_rank_layers(beyond) == ["`1` is 3 × 8, its rank 4"]


@pytest.mark.parametrize(
    ("config", "targets", "rank", "published", "counted"),
    [
        # Hu et al. 2022. GPT-2's c_attn has q, k and v: one pair of it has as many numbers as pairs of q and of v.
        (hf.GPT2Config(n_embd=1024, n_layer=24, n_head=16), ["c_attn"], 4, "0.35 M", 393_216),
        (hf.RobertaConfig(), ["query", "value"], 8, "0.3 M", 294_912),
        (
            hf.OPTConfig(hidden_size=12288, word_embed_proj_dim=12288, num_hidden_layers=96, num_attention_heads=96),
            ["q_proj", "v_proj"],
            4,
            "18.9 M, of GPT-3",
            18_874_368,
        ),
    ],
    ids=["GPT-2 medium", "RoBERTa-base", "175 B"],
)
def test_trained_parameters_are_those_that_were_published(
    config: Any, targets: list[str], rank: int, published: str, counted: int
) -> None:
    with torch.device("meta"):
        module = hf.AutoModel.from_config(config)
    adapter = layers.create_adapter(module, targets=targets, rank=rank, alpha=2 * rank, seed=0)
    assert adapter.parameters == counted, published
