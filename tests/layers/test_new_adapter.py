"""New adapters: from random numbers, and from the weights themselves."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from numpy.typing import NDArray
from torch import nn
from transformers import BertForSequenceClassification, GPT2LMHeadModel

from lora_export import layers, plan
from lora_export.errors import InputRefused
from lora_export.formats import WriteOptions
from lora_export.formats import peft as peft_writer
from lora_export.layers.new_adapter import STARTING_POINT, Init, as_plain_lora, frozen_start, started_from_weights
from lora_export.lora import Adapter, LoraPair
from support import experts
from support.architectures import tiny_models
from support.small_layers import TARGETS, Everything, a_linear, a_model, an_encoder_layer, base_of, equal, plan_for
from support.tiny_models import tiny_bert, tiny_gpt2


def a_classifier() -> BertForSequenceClassification:
    return tiny_bert(num_hidden_layers=2, vocab_size=11)


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


@pytest.mark.parametrize(
    ("architecture", "left_out"),
    [("MambaForCausalLM", "out_proj"), ("PhimoeForCausalLM", "router"), ("Llama4ForCausalLM", "router")],
)
def test_all_linear_leaves_out_what_peft_cannot_adapt(architecture: str, left_out: str, tmp_path: Path) -> None:
    model: Any = next(tiny_models(architecture))
    linear = {path for path, part in model.named_modules() if isinstance(part, nn.Linear)}
    assert any(path.endswith(left_out) for path in linear)
    adapter = layers.create_adapter(model, targets="all-linear", rank=2, alpha=2, seed=0)
    assert adapter.pairs and not any(path.endswith(left_out) for path in adapter.pairs)
    peft_writer.write(adapter, tmp_path, WriteOptions())
    theirs = peft.PeftModel.from_pretrained(model, tmp_path)
    assert theirs(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_all_linear_leaves_out_the_output_embeddings() -> None:
    model = tiny_gpt2()
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


IDS = torch.tensor([[1, 5, 0, 3, 3, 10, 2]])


def started(module: nn.Module, init: Init, targets: Any, **options: Any) -> Adapter:
    new = layers.create_adapter(module, **{"targets": targets, "rank": 2, "alpha": 3, "seed": 0, **options})
    return started_from_weights(module, new, init)


def as_matrix(pair: LoraPair) -> NDArray[np.float64]:
    return pair.scale * pair.b.reshape(-1, pair.rank).astype(np.float64) @ pair.a.reshape(pair.rank, -1)


def test_pissa_takes_the_largest_singular_values_in_equal_shares() -> None:
    module = nn.Sequential(nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[0.0, 9, 0], [4, 0, 0], [0, 0, 1]]))
    pair = started(module, "pissa", ["0"], rank=2, alpha=2).pairs["0"]
    np.testing.assert_allclose(pair.delta(), [[0, 9, 0], [4, 0, 0], [0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(np.abs(pair.a), [[0, 3, 0], [2, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(np.abs(pair.b), [[3, 0], [0, 2], [0, 0]], atol=1e-6)


def test_olora_takes_the_first_columns_of_q() -> None:
    module = nn.Sequential(nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[2.0, 3, 5], [0, 4, 7], [0, 0, 6]]))  # Q is the identity, up to signs
    pair = started(module, "olora", ["0"], rank=2, alpha=1).pairs["0"]
    np.testing.assert_allclose(np.abs(pair.b), [[1, 0], [0, 1], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(pair.delta(), [[1, 1.5, 2.5], [0, 2, 3.5], [0, 0, 0]], atol=1e-6)  # half of two rows


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_every_kind_of_layer_starts_as_its_base(init: Init) -> None:
    base = base_of(Everything)
    # The convolution `two` has one input channel of 2 x 3 weights: as a matrix (4, 6).
    start = started(base, init, ["words", "fc", "fan", "one", "two"])
    module = copy.deepcopy(base)
    changes = plan.make([start, frozen_start(start)], layers.specs(module), identity_ok=True)
    layers.attach(module, changes, trainable=True, frozen={STARTING_POINT})
    torch.testing.assert_close(module(IDS), base(IDS), rtol=1e-5, atol=1e-5)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.lora_{side}.default" for name in start.pairs for side in "AB"}
    weights = {"words": base.words.weight.T, "fc": base.fc.weight, "fan": base.fan.weight.T}
    weights |= {name: getattr(base, name).weight.flatten(1) for name in ("one", "two")}
    for name, pair in start.pairs.items():
        exact = weights[name].detach().double().numpy()
        if init == "pissa":
            left, values, right = np.linalg.svd(exact, full_matrices=False)
            expected = (left[:, :2] * values[:2]) @ right[:2]
        else:
            q, r = np.linalg.qr(exact)
            expected = 1.5 * q[:, :2] @ r[:2]
        np.testing.assert_allclose(as_matrix(pair), expected, atol=1e-5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in trained:
                parameter.add_(0.1)
    saved = as_plain_lora(layers.read_back(module, start), start)
    plain = copy.deepcopy(base)
    layers.attach(plain, plan.make([saved], layers.specs(plain)))
    assert (plain(IDS) - base(IDS)).abs().max() > 1e-2
    torch.testing.assert_close(plain(IDS), module(IDS), rtol=1e-4, atol=1e-5)


def test_a_packed_attention_starts_from_its_weights() -> None:
    module = nn.TransformerEncoder(an_encoder_layer(), 1).eval()
    x = torch.randn(2, 5, 8)
    before = module(x)
    start = started(module, "pissa", "all-linear")
    assert len(start.pairs) == 4
    changes = plan.make([start, frozen_start(start)], layers.specs(module), identity_ok=True)
    layers.attach(module, changes, trainable=True, frozen={STARTING_POINT})
    for training in (True, False):
        torch.testing.assert_close(module.train(training)(x), before, rtol=1e-4, atol=1e-5)


def test_without_training_the_saved_adapter_changes_nothing() -> None:
    start = started(a_model(), "pissa", "all-linear")
    saved = as_plain_lora(start, start)
    assert saved.is_identity and saved.pairs["0"].rank == 4
    assert saved.pairs["0"].a[2:].tolist() == start.pairs["0"].a.tolist()


@pytest.mark.parametrize(("rslora", "alpha"), [(False, 6.0), (True, 3 * 2**0.5)])
def test_the_saved_adapter_records_its_own_rank_and_the_start(rslora: bool, alpha: float) -> None:
    start = started(a_model(), "olora", "all-linear", rslora=rslora)
    pair = dataclasses.replace(start.pairs["0"], b=2 * start.pairs["0"].b)
    saved = as_plain_lora(dataclasses.replace(start, pairs={"0": pair}), start)
    assert (saved.metadata["r"], saved.metadata["init"]) == (4, "olora of rank 2")
    assert saved.metadata["lora_alpha"] == pytest.approx(alpha)
    assert saved.pairs["0"].scale == start.pairs["0"].scale
    np.testing.assert_allclose(saved.pairs["0"].delta(), start.pairs["0"].delta(), atol=1e-6)


def test_each_layer_is_reported_and_default_needs_none() -> None:
    module, seen = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), []
    new = layers.create_adapter(module, targets="all-linear", rank=2, alpha=3, seed=0)
    assert started_from_weights(module, new, "default", on_layer=lambda *done: seen.append(done)) is new
    assert seen == []
    started_from_weights(module, new, "pissa", on_layer=lambda *done: seen.append(done))
    assert seen == [(1, 2), (2, 2)]


def test_what_cannot_be_decomposed_is_refused() -> None:
    with pytest.raises(InputRefused, match=r'too few directions .*\(init="pissa"\):\s+`0` is 2 × 3, its rank 3'):
        started(a_model(), "pissa", ["0"], rank=3)
    broken = a_model()
    with torch.no_grad():
        broken[0].weight[0, 0] = float("nan")
    with pytest.raises(InputRefused, match=r"0\.weight has values that are not finite"):
        started(broken, "olora", ["0"])
    with pytest.raises(InputRefused, match=r"only layers start from their weights .*:\s+.*\.experts\.down_proj\[0\]"):
        started(experts.tiny_model("mixtral"), "pissa", [], target_parameters=["experts.down_proj"])


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_weight_without_directions_starts_from_finite_factors(init: Init) -> None:
    module = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        module[0].weight.zero_()
        module[1].weight.copy_(torch.outer(torch.arange(1.0, 5), torch.ones(4)))  # of rank 1
    pairs = started(module, init, "all-linear").pairs
    assert not pairs["0"].delta().any()
    expected = module[1].weight.detach().numpy() * (1 if init == "pissa" else 1.5)
    np.testing.assert_allclose(pairs["1"].delta(), expected, atol=1e-5)
