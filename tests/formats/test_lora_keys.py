"""The keys of adapters of one file: every spelling that trainers use."""

from __future__ import annotations

import pytest

from lora_export.formats.lora_keys import KeyPart, has_pairs, sort_keys, split_key

SPELLINGS = {
    KeyPart.A: [
        "lora_down.weight",
        "lora_A.weight",
        "lora_A.default.weight",
        "lora_A",
        "lora.down.weight",
        "lora_linear_layer.down.weight",
    ],
    KeyPart.B: [
        "lora_up.weight",
        "lora_B.weight",
        "lora_B.default.weight",
        "lora_B",
        "lora.up.weight",
        "lora_linear_layer.up.weight",
    ],
    KeyPart.B_BIAS: ["lora_B.bias", "lora_up.bias"],
    KeyPart.MID: ["lora_mid.weight"],
    KeyPart.ALPHA: ["alpha", "lora.alpha", "lora_linear_layer.alpha"],
    KeyPart.MAGNITUDE: [
        "lora_magnitude_vector",
        "lora_magnitude_vector.weight",
        "lora_magnitude_vector.default.weight",
    ],
    KeyPart.DORA_SCALE: ["dora_scale"],
    KeyPart.CHANGE: ["diff"],
    KeyPart.BIAS_CHANGE: ["diff_b"],
    KeyPart.NORM_CHANGE: ["w_norm"],
    KeyPart.LOHA_W1_A: ["hada_w1_a", "hada_w1_a.weight"],
    KeyPart.LOKR_W2: ["lokr_w2"],
    KeyPart.LOKR_T2: ["lokr_t2"],
}


@pytest.mark.parametrize(
    ("part", "ending"), [(part, ending) for part, endings in SPELLINGS.items() for ending in endings]
)
def test_a_spelling_names_module_and_part(part, ending):
    assert split_key(f"lora_unet_x.{ending}") == ("lora_unet_x", part)
    assert split_key(f"blocks.0.attn.to_out.0.{ending}") == ("blocks.0.attn.to_out.0", part)


def test_the_layers_of_an_attention_processor_are_those_of_the_attention():
    assert split_key("down.attn1.processor.to_q_lora.down.weight") == ("down.attn1.to_q", KeyPart.A)
    assert split_key("down.attn1.processor.to_out_lora.up.weight") == ("down.attn1.to_out.0", KeyPart.B)
    assert split_key("layers.0.self_attn.to_v_lora.alpha") == ("layers.0.self_attn.to_v", KeyPart.ALPHA)


@pytest.mark.parametrize(
    "key", ["", "lora_A.weight", "a.weight", "a.bias", "a.lora_C.weight", "bundle_emb.x.string_to_param.*"]
)
def test_another_key_names_nothing(key):
    assert split_key(key) is None


def test_keys_are_sorted_by_module():
    keys = ["x.a.lora_A.weight", "x.a.lora_down.weight", "x.a.lora_B.weight", "x.b.alpha", "x.weight", "y.c.diff"]
    found = sort_keys(keys, lambda name: name.removeprefix("x.") if name.startswith("x.") else None)
    assert found.modules == {
        "a": {KeyPart.A: "x.a.lora_A.weight", KeyPart.B: "x.a.lora_B.weight"},
        "b": {KeyPart.ALPHA: "x.b.alpha"},
    }
    assert found.unknown == ("x.weight", "y.c.diff")
    assert found.duplicates == ("x.a.lora_A.weight and x.a.lora_down.weight",)


def test_an_alpha_alone_is_no_adapter():
    assert not has_pairs(["a.alpha", "b.weight"])
    assert has_pairs(["a.alpha", "b.lokr_w1"])
