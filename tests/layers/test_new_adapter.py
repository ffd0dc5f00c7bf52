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
from support import experts
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


def test_convolutions_and_embeddings_are_adapted_where_they_are_named():
    base = base_of(Everything)
    fresh = layers.create_adapter(base, targets="all-linear", rank=1, alpha=1, seed=0)
    assert fresh.pairs.keys() == {"fc", "fan"}
    named = layers.create_adapter(base, targets=["words", "two"], rank=2, alpha=1, seed=0)
    assert {key: (pair.a.shape, pair.b.shape) for key, pair in named.pairs.items()} == {
        "words": ((2, 11), (6, 2)),
        "two": ((2, 1, 2, 3), (4, 2, 1, 1)),
    }
    assert named.pairs["words"].embedding and named.pairs["words"].b.any() and not named.pairs["words"].a.any()
    assert 0.3 < np.abs(named.pairs["two"].a).max() <= 1 / np.sqrt(6)
    for target in ("words", "one"):
        with pytest.raises(InputRefused, match=f"`{target}` is no linear layer"):
            layers.create_adapter(base, targets=[target], rank=1, alpha=1, seed=0, linear_only=True)


def test_patterns_decide_rank_and_alpha_of_the_layers_whose_names_end_so() -> None:
    options = {"rank_pattern": {r"0\..*query": 4, "query": 1}, "alpha_pattern": {r"layer\.1\..*": 6.0}}
    adapter = layers.create_adapter(
        a_classifier(), targets=[], target_pattern=r".*\.(query|key)", rank=2, alpha=4, seed=0, rslora=True, **options
    )
    found = {name.removeprefix("bert.encoder.layer."): pair for name, pair in adapter.pairs.items()}
    assert {name: (pair.rank, pair.scale) for name, pair in found.items()} == {
        "0.attention.self.query": (4, 4 / 2.0),
        "0.attention.self.key": (2, 4 / np.sqrt(2)),
        "1.attention.self.query": (1, 6.0),
        "1.attention.self.key": (2, 6 / np.sqrt(2)),
    }
    assert adapter.targets == tuple(adapter.pairs)  # no ending stands for them


def test_dora_starts_with_the_lengths_of_the_outputs() -> None:
    base = base_of(Everything)
    adapter = layers.create_adapter(base, targets=["words", "fan", "one"], rank=1, alpha=1, seed=0, dora=True)
    lengths = {name: pair.magnitude for name, pair in adapter.pairs.items()}
    expected = {"words": base.words.weight.norm(dim=0), "fan": base.fan.weight.norm(dim=0)}
    expected["one"] = base.one.weight.flatten(1).norm(dim=1)
    assert all(np.allclose(lengths[name], value.detach().numpy(), rtol=1e-6) for name, value in expected.items())


def test_biases_and_rows_of_tokens_are_trained_on_request() -> None:
    model = a_classifier()
    few = layers.create_adapter(model, targets=["query"], rank=1, alpha=1, seed=0, bias="lora_only")
    assert list(few.replaced) == [f"bert.encoder.layer.{n}.attention.self.query.bias" for n in (0, 1)]
    every = layers.create_adapter(model, targets=["query"], rank=1, alpha=1, seed=0, bias="all", token_indices=[7, 2])
    assert every.replaced.keys() == {name for name, _ in model.named_parameters() if name.endswith("bias")}
    ((name, rows),) = every.token_rows.items()
    assert name == "bert.embeddings.word_embeddings.weight" and rows.indices.tolist() == [7, 2]
    assert (rows.values == model.get_input_embeddings().weight[[7, 2]].detach().numpy()).all()


def test_new_experts_start_with_pefts_factors_of_their_inputs() -> None:
    for name, zero in (("mixtral", "b"), ("gpt_oss", "a")):  # gpt_oss stores (in, out)
        model = experts.tiny_model(name)
        adapter = layers.create_adapter(
            model, targets=[], target_parameters=["experts.down_proj"], rank=2, alpha=2, seed=0
        )
        assert list(adapter.pairs) == [f"model.layers.0.mlp.experts.down_proj[{n}]" for n in range(experts.COUNT)]
        for pair in adapter.pairs.values():
            assert pair.as_stored and not getattr(pair, zero).any() and (pair.a.any() or pair.b.any())


def test_what_has_no_meaning_is_refused() -> None:
    moe, net = experts.tiny_model("mixtral"), nn.Sequential(nn.Embedding(5, 4), nn.Embedding(5, 4), nn.Linear(4, 4))
    with pytest.raises(InputRefused, match=r"DoRA has no meaning for stacked parameters: .*\.down_proj"):
        layers.create_adapter(moe, targets=[], target_parameters=["down_proj"], rank=1, alpha=1, seed=0, dora=True)
    with pytest.raises(InputRefused, match="the one table of input embeddings; the module has 0, 1"):
        layers.create_adapter(net, targets="all-linear", rank=1, alpha=1, seed=0, token_indices=[1])
    with pytest.raises(InputRefused, match=r"no row 11 in bert\.embeddings\.word_embeddings, which has 11 rows"):
        layers.create_adapter(a_classifier(), targets=["query"], rank=1, alpha=1, seed=0, token_indices=[11])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["qurey"]}, r"`qurey` matches no layer to adapt; the nearest: query"),
        ({"targets": ["embeddings"]}, r"`embeddings` is no layer to adapt; in it are: .*word_embeddings"),
        ({"targets": [], "target_pattern": "query"}, r"`query` matches the whole name of no layer .*: query"),
        ({"targets": [], "target_pattern": "que(ry"}, r"`que\(ry` is not a regular expression: missing \)"),
        ({"targets": [], "target_parameters": ["query"]}, r"`query` is no stacked parameter"),
        (
            {"targets": ["query"], "rank_pattern": {"valeu": 2}},
            r"the rank pattern `valeu` matches the name of no adapted layer; the nearest: .*query",
        ),
        (
            {"targets": ["query"], "rank_pattern": {"valeu": 2}, "alpha_pattern": {"valeu": 4}},
            r"^the rank pattern `valeu` matches the name of no adapted layer; the nearest: [^;]*$",
        ),
        ({"targets": ["layer.0"]}, r"`layer\.0` is no layer to adapt; in it are: (bert\.encoder\.layer\.0\S+ ){2}"),
        ({"targets": ["query"], "alpha_pattern": {"key": 2}}, "the alpha pattern `key` matches the name of no adapted"),
        ({"targets": ["query"], "rank_pattern": {"query": 0}}, "the rank of `query` is 0: it must be positive"),
        ({"targets": ["query"], "alpha_pattern": {"query": -1.0}}, r"the alpha of `query` is -1\.0: it must be posit"),
        ({"targets": ["query"], "dropout": 1.0}, r"dropout 1\.0: it must be from 0 to below 1"),
        (
            {"targets": ["query"], "modules_to_save": ["classifer"]},
            r"`classifer` matches no module; the nearest: classifier",
        ),
        ({"targets": "all-linear", "exclude": ["dense2"]}, r"`dense2` matches no module; the nearest: dense"),
        ({"targets": ["a", "b"]}, r"`a` matches no layer to adapt.*; `b` matches no layer"),
        ({"targets": ["classifier"], "modules_to_save": ["classifier"]}, "no layer is left to adapt"),
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
    assert layers.full_rank_layers(fitting) == {}
    assert layers.full_rank_layers(beyond) == {"1": "`1` is 3 × 8, its rank 4"}


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
