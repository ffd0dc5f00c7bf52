"""The keys of a PEFT adapter, and the modules and parameters that they belong to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_export import formats
from support.peft_folders import A_KEY, B_KEY, refusal, with_tensors
from support.peft_models import whole_tensors


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["emb.lora_embedding_A.weight", "emb.lora_embedding_B.bias"], "unknown kinds of tensors: "),
        (["fc.lora_magnitude_vector.bias"], "unknown kinds of tensors: "),
        (["fc.lora_A"], "unknown kinds of tensors: "),
        (["emb.token_adapter.weight"], "unknown kinds of tensors: "),
        (["fc.lora_C.weight"], "unknown kinds of tensors: "),
        (["fc.lora_A.bias"], "unknown kinds of tensors: "),
    ],
)
@pytest.mark.fault(18)
def test_tensors_of_unknown_kinds_are_refused_and_listed(tmp_path, keys, message):
    keys = [f"base_model.model.{key}" for key in keys]
    text = refusal(with_tensors(tmp_path, {key: [[1]] for key in keys}))
    assert text == f"ADAPTER/adapter_model.safetensors: {message}{', '.join(keys)}"


def test_a_mix_of_keys_with_and_without_prefix_is_refused(tmp_path):
    text = refusal(with_tensors(tmp_path, {"fd.lora_A.weight": [[1]], "fd.lora_B.weight": [[1]]}))
    assert text.endswith("some keys start with `base_model.model.`, these do not: fd.lora_A.weight, fd.lora_B.weight")


@pytest.mark.fault(21)
@pytest.mark.parametrize(
    ("others", "chosen", "message"),
    [
        ([""], "", '2 adapters: one without a name, second; choose one: stored_adapter="second"'),
        (["first."], "", '2 adapters: first, second; choose one: stored_adapter="second"'),
        (["first."], "third", "2 adapters: first, second; it has no third"),
        ([], "first", "1 adapter: second; it has no first"),
    ],
)
def test_an_adapter_of_several_has_to_be_chosen(tmp_path, others, chosen, message):
    names = [f"fc.lora_{side}.{name}weight" for name in (*others, "second.") for side in "AB"]
    tensors = {f"base_model.model.{key}": [[1]] for key in names} | dict.fromkeys(
        () if "" in others else (A_KEY, B_KEY)
    )
    text = refusal(with_tensors(tmp_path, tensors), stored_adapter=chosen)
    assert text == f"ADAPTER/adapter_model.safetensors contains {message}"


def test_an_adapter_without_a_name_is_none_that_was_chosen(tmp_path):
    text = refusal(with_tensors(tmp_path, {}), stored_adapter="first")
    assert text.endswith("contains 1 adapter: one without a name; it has no first")


def test_two_keys_for_one_tensor_with_equal_values_are_one(tmp_path):
    keys = ["head.modules_to_save.bias", "head.bias", "head.original_module.bias"]
    values = [[2, 3], [2, 3], [0, 0]]
    tensors = {f"base_model.model.{key}": value for key, value in zip(keys, values, strict=True)}
    adapter = formats.load(with_tensors(tmp_path, tensors, bias="all", modules_to_save=["head"]))
    assert whole_tensors(adapter) == {"head.bias": [2, 3]}
    assert any(note.endswith("are left out: head.original_module.bias") for note in adapter.notes)


def test_a_saved_module_inside_of_a_saved_module_is_refused(tmp_path):
    """PEFT saves `block.head` in two places, where `modules_to_save` names `block` and `head`, or both by one word."""
    keys = [
        "block.head.modules_to_save.default.bias",
        "block.head.original_module.bias",
        "block.modules_to_save.default.head.bias",
    ]
    tensors = {f"base_model.model.{key}": [2, 3] for key in keys}
    text = refusal(with_tensors(tmp_path, tensors, modules_to_save=["block", "head"]))
    assert "block.head is saved inside of another saved module, and PEFT keeps two copies of it. Train" in text


@pytest.mark.parametrize("saved", ["lora_head", "head"])  # PEFT saves what ends so
def test_a_saved_module_may_have_a_name_of_loras(tmp_path, saved):
    tensors = {f"base_model.model.{key}": [[1]] for key in ("lora_head.weight", "my_lora_x.weight")}
    adapter = formats.load(with_tensors(tmp_path, tensors, modules_to_save=[saved]))
    assert whole_tensors(adapter) == {"lora_head.weight": [[1]], "my_lora_x.weight": [[1]]}


@pytest.mark.parametrize("key", ["lora_head.weight", "fc.lora_diag", "fc.lora_up.weight", "fc.lora_velora_embed"])
def test_a_name_of_loras_that_the_config_does_not_declare_is_refused(tmp_path, key):
    folder = with_tensors(tmp_path, {f"base_model.model.{key}": [[1]]}, modules_to_save=["body"])
    assert refusal(folder).endswith(f"unknown kinds of tensors: base_model.model.{key}")


def parameters(tmp_path: Path, keys: list[str], targets: list[str], a: Any = ((1, 2),), **config: Any) -> Path:
    tensors = {f"base_model.model.{key}.lora_A.weight": a for key in keys}
    tensors |= {f"base_model.model.{key}.lora_B.weight": np.ones((3, len(a))) for key in keys}
    return with_tensors(tmp_path, tensors, target_parameters=targets, **config)


@pytest.mark.parametrize(
    ("key", "targets", "pair"),
    [
        ("m.lin", ["lin.weight"], "m.lin"),
        ("m.lin", ["m.lin.kernel"], "m.lin.kernel"),
        ("m.lin", ["kernel"], "m.lin.kernel"),
        ("m.lin", ["other.weight", "lin.kernel"], "m.lin.kernel"),
        ("m.lin", ["down_proj", "lin.weight", "up_proj"], "m.lin"),  # the bare names are those of another module
    ],
)
def test_a_pair_of_a_bare_parameter_has_its_name(tmp_path, key, targets, pair):
    adapter = formats.load(parameters(tmp_path, [key], targets))
    assert adapter.pairs.keys() == {"fc", pair}
    assert adapter.pairs[pair].as_stored and not adapter.pairs["fc"].as_stored
    assert adapter.layouts == {pair: "out_in"}
    assert adapter.targets == ("fc", *(target.removesuffix(".weight") for target in targets))


@pytest.mark.parametrize(
    ("pattern", "modules"),
    [
        (r".*\.lin|fc", {"fc", "m.lin"}),
        ("m.lin", {"fc.kernel", "m.lin"}),
        ("lin", {"fc.kernel", "m.lin.kernel"}),  # it matches whole names
        ("m(?=.lin).*", {"fc.kernel", "m.lin.kernel"}),  # a pattern that is not matched here tells nothing
    ],
)
def test_a_module_that_a_pattern_targets_is_no_parameter(tmp_path, pattern, modules):
    """PEFT refuses to adapt a module and one of its parameters."""
    adapter = formats.load(parameters(tmp_path, ["m.lin"], ["kernel"], target_modules=pattern))
    assert adapter.pairs.keys() == modules


def test_patterns_match_the_name_of_the_parameter(tmp_path):
    adapter = formats.load(parameters(tmp_path, ["m"], ["m.kernel"], alpha_pattern={"kernel": 7}))
    assert (adapter.pairs["m.kernel"].scale, adapter.pairs["fc"].scale) == (7, 1)


@pytest.mark.parametrize(
    ("keys", "targets", "why"),
    [
        (["m", "m.base_layer"], ["m.up", "m.down"], r"2 parameters of m are in .*\(down, up\), the file has 2 pairs"),
        (["m"], ["m.up_proj", "m.down_proj"], r"2 parameters of m are in .*, the file has 1 pair for it"),
        (["m", "m.base_layer"], ["m.up_proj"], r"1 parameters of m are in .*, the file has 2 pairs for it"),
    ],
)
def test_pairs_whose_parameter_is_not_certain_are_refused(tmp_path, keys, targets, why):
    text = refusal(parameters(tmp_path, keys, targets))
    assert re.search(why, text) and "does not record which pair is whose" in text


def test_nested_pairs_belong_to_the_parameters_in_order_of_registration(tmp_path):
    folder = parameters(tmp_path, ["m", "m.base_layer"], ["m.down_proj", "m.up_proj"])
    adapter = formats.load(folder)
    keys = [adapter.spelled(f"m.{name}_proj") for name in ("up", "down")]
    assert keys == ["base_model.model.m.base_layer.lora_A.weight", "base_model.model.m.lora_A.weight"]


def test_a_flat_pair_is_that_of_every_expert(tmp_path):
    folder = parameters(tmp_path, ["experts"], ["experts.up"], a=[[1, 2]] * 2, peft_version="0.18.1")
    adapter = formats.load(folder)
    assert sorted(adapter.pairs) == ["experts.up[0]", "experts.up[1]", "fc"]
    assert adapter.pairs["experts.up[1]"].shape == (3, 2) and adapter.pairs["experts.up[1]"].as_stored
    assert dict(adapter.experts) == {"experts.up": "transposed"}
    assert adapter.spelled("experts.up[1]") == "base_model.model.experts.lora_A.weight"


@pytest.mark.parametrize("name", ["lora_magnitude_vector", "lora_B.bias"])
def test_a_magnitude_or_a_bias_beside_experts_is_refused(tmp_path, name):
    tensors = {"base_model.model.experts.up.lora_A.weight": np.ones((2, 1, 3))}
    tensors |= {"base_model.model.experts.up.lora_B.weight": np.ones((2, 4, 1))}
    tensors |= {f"base_model.model.experts.up.{name}": np.ones(4)}
    config = {"use_dora": True} if "magnitude" in name else {"lora_bias": True}
    assert "a magnitude or a bias beside the pairs of experts is not supported" in refusal(
        with_tensors(tmp_path, tensors, **config)
    )


def test_two_keys_for_one_tensor_are_refused(tmp_path):
    keys = ["base_model.model.head.modules_to_save.weight", "base_model.model.head.weight"]
    text = refusal(with_tensors(tmp_path, {key: [[number]] for number, key in enumerate(keys)}))
    assert text.endswith(f"contains one tensor under two names, with different values: {keys[0]} and {keys[1]}")
