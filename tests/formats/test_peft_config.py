"""The config of a PEFT adapter: what is not supported is refused by name."""

from __future__ import annotations

import copy
import json
from typing import Any

import peft
import pytest
import torch

from lora_export import formats
from support.peft_folders import refusal, simple
from support.peft_models import Mlp, fill, read_back, trained


@pytest.fixture(scope="module")
def mlp() -> Mlp:
    torch.manual_seed(0)
    return Mlp()


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    "kind", [peft.LoraConfig(r=2, lora_alpha=4, target_modules=["up"]), peft.LoHaConfig(r=2, target_modules=["up"])]
)
@pytest.mark.fault(18)
def test_the_first_matching_pattern_is_used_and_others_are_noted(mlp, tmp_path, kind, order):
    # PEFT saves its patterns sorted, whatever their order was when it trained: what it reads back is the truth.
    model = peft.get_peft_model(copy.deepcopy(mlp), copy.deepcopy(kind))
    fill(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["alpha_pattern"] = dict([("blocks.1.up", 5), (r"blocks\.\d\.up", 6)][::order])
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = formats.load(tmp_path)
    layer = peft.PeftModel.from_pretrained(copy.deepcopy(mlp), tmp_path).get_submodule("base_model.model.blocks.1.up")
    pair = adapter.pairs["blocks.1.up"]
    assert torch.allclose(layer.get_delta_weight("default"), torch.tensor(pair.delta()), rtol=1e-5)
    assert pair.scale == (2.5 if order == 1 else 3)
    assert adapter.notes == (
        "blocks.1.up: several patterns of alpha_pattern match it; the first one in the file is used, as PEFT does",
    )


def test_targets_are_read_from_a_plain_list_only(mlp, tmp_path):
    configs: list[tuple[Any, tuple[str, ...]]] = [
        ({"target_modules": ["first", "last"]}, ("first", "last")),
        ({"target_modules": r".*up"}, ()),
        ({"target_modules": ["up", "down"], "exclude_modules": ["blocks.0.up"]}, ()),
        ({"target_modules": ["up"], "layers_to_transform": [0], "layers_pattern": "blocks"}, ()),
    ]
    for number, (config, targets) in enumerate(configs):
        assert tuple(sorted(read_back(trained(mlp, **config), tmp_path / str(number)).targets)) == targets


@pytest.mark.parametrize("saved", ["head", ["head"]])
def test_modules_to_save_in_one_string_are_its_letters(tmp_path, saved):
    net = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ("up", "fc", "head", "first", "a")})
    model = peft.get_peft_model(net, peft.LoraConfig(target_modules=["up"], modules_to_save=saved))
    fill(model)
    model.save_pretrained(tmp_path)
    adapter = formats.load(tmp_path)
    named = {name for name in net if adapter.saved_whole.module_around(f"{name}.weight")}
    assert {f"{name}.{kind}" for name in named for kind in ("weight", "bias")} == adapter.replaced.keys()
    assert named == ({"head", "a"} if saved == "head" else {"head"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": 1}, "use_dora is 1; its type must be bool"),
        ({"use_rslora": "false"}, "use_rslora is 'false'; its type must be bool"),
        ({"ensure_weight_tying": "false"}, "ensure_weight_tying is 'false'; its type must be bool"),
        ({"target_modules": 3}, "target_modules is 3; its type must be str or list"),
        ({"rank_pattern": []}, "rank_pattern is []; its type must be dict"),
        ({"r": "16"}, "r is '16'; it must be a positive number"),
        ({"lora_alpha": None}, "lora_alpha is None; it must be a number other than 0"),
        ({"use_dora": True, "lora_bias": True}, "use_dora and lora_bias: PEFT allows only one of them"),
        ({"use_qalora": True}, "use_qalora: QA-LoRA is not supported"),
        ({"use_bdlora": {"a": 1}}, "use_bdlora: BD-LoRA is not supported"),
        ({"target_parameters": [["x"]]}, "target_parameters has ['x']; it must have names"),
        ({"modules_to_save": ["head", 1]}, "modules_to_save has 1; it must have names"),
        ({"target_parameters": "experts.up"}, "target_parameters is 'experts.up'; its type must be list"),
        ({"trainable_token_indices": "1"}, "trainable_token_indices is '1'; its type must be list or dict"),
        ({"layer_replication": [[0, 2]]}, "layer_replication: replicated layers share one base weight"),
        (
            {"alora_invocation_tokens": [1]},
            "is an activated LoRA (alora_invocation_tokens): it acts from its invocation",
        ),
        ({"alora_invocation_tokens": "ab"}, "alora_invocation_tokens is 'ab'; its type must be list"),
        ({"alora_invocation_tokens": [1, -1]}, "alora_invocation_tokens is [1, -1]; it must have the ids of tokens"),
        ({"alora_invocation_tokens": [1] * 513}, "alora_invocation_tokens has 513 tokens; up to 512 are supported"),
        ({"alora_invocation_tokens": [True]}, "alora_invocation_tokens is [True]; it must have the ids of tokens"),
        ({"alora_invocation_tokens": [1], "lora_bias": True}, "alora_invocation_tokens and lora_bias: not supported"),
        ({"alora_invocation_tokens": [1], "use_dora": True}, "alora_invocation_tokens and use_dora: not supported"),
        ({"arrow_config": {"a": 1}}, "arrow_config: Arrow routes every token between other adapters"),
        ({"megatron_config": {"a": 1}}, "megatron_config: Megatron layers are not supported"),
        ({"kasa_config": {"a": 1}}, "kasa_config: KaSA changes the base weights. PEFT cannot convert such an adapter"),
        ({"init_lora_weights": "loftq"}, "original base is wrong. PEFT cannot convert such an adapter to plain LoRA"),
        ({"init_lora_weights": "corda"}, "original base is wrong. Convert the adapter to plain LoRA first"),
        ({"init_lora_weights": "lora_ga"}, "original base is wrong. Convert the adapter to plain LoRA first"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base weights"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16', which changes"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora', which changes the base weights"),
        *(
            ({"init_lora_weights": "pissa", **more}, "original base is wrong. PEFT cannot convert such an adapter")
            for more in (
                {"use_rslora": True, "rank_pattern": {"fc": 2}},
                {"use_rslora": True, "alpha_pattern": {"fc": 2}},
                {"use_dora": True},
                {"modules_to_save": ["head"]},
                {"trainable_token_indices": [1]},
                {"bias": "all"},
            )
        ),
        ({"init_lora_weights": "pissa", "rank_pattern": {"fc": 2}, "use_rslora": False}, "wrong. Convert the adapter"),
        ({"next_years_idea": 0.5, "and_another": [1]}, "unknown fields: and_another, next_years_idea"),
        ({"peft_type": "NEXT_YEARS"}, "peft_type is 'NEXT_YEARS', which is not supported; supported are LORA, ADALORA"),
        ({"peft_type": None}, "peft_type is None, which is not supported"),
        ({"peft_type": "PREFIX_TUNING"}, "cannot be merged into weights: it puts trained keys and values before those"),
        ({"rank_pattern": [1]}, "rank_pattern is [1]; its type must be dict"),
        ({"rank_pattern": {"fc": 0}}, "rank_pattern['fc'] is 0; it must be a positive number"),
        ({"alpha_pattern": {"fc": "8"}}, "alpha_pattern['fc'] is '8'; it must be a number other than 0"),
        ({"alpha_pattern": {"(": 8}}, "alpha_pattern: the pattern '(' is not a regular expression"),
    ],
)
@pytest.mark.fault(18, 48)
def test_unsupported_fields_are_refused_by_name(tmp_path, config, message):
    text = refusal(simple(tmp_path, **config))
    assert message in text
    assert ("unknown fields" in text) == ("next_years_idea" in config)


def test_all_refused_fields_are_listed_at_once(tmp_path):
    text = refusal(simple(tmp_path, use_qalora=True, layer_replication=[[0, 1]], surprise=1, init_lora_weights="loftq"))
    assert all(name in text for name in ("use_qalora", "layer_replication", "surprise", "init_lora_weights"))


@pytest.mark.parametrize("field", ["loftq_config", "corda_config", "lora_ga_config"])
def test_the_config_of_an_init_beside_a_plain_one_is_accepted(tmp_path, field):
    """PEFT leaves it in an adapter that it has converted, and ignores it."""
    assert formats.load(simple(tmp_path, **{field: {"a": 1}})).pairs.keys() == {"fc"}


@pytest.mark.parametrize("config", [{"use_dora": False}, {"next_years_idea": None}, {"target_parameters": []}])
def test_disabled_fields_are_not_refused(tmp_path, config):
    assert formats.load(simple(tmp_path, **config)).pairs.keys() == {"fc"}
