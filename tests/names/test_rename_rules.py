"""One rule: what it matches, and the name that it gives."""

from __future__ import annotations

import pytest

from lora_export.names.rename_rules import RenameRule, loading_order


def renamed(rule: RenameRule, name: str) -> str | None:
    found = rule.rename(name)
    return None if found is None else found.name


def test_a_pattern_ends_at_a_word_boundary():
    rule = RenameRule(["attn.proj"], ["o_proj"])
    assert renamed(rule, "0.attn.proj.weight") == "0.o_proj.weight"
    assert renamed(rule, "0.attn.proj_out.weight") is None
    assert renamed(RenameRule(["hc_"], ["gate_"]), "hc_fn") == "gate_fn"


def test_the_longest_pattern_is_tried_first():
    rule = RenameRule(["weight", "weight.absmax"], ["w"])
    found = rule.rename("fc.weight.absmax")
    assert found is not None and (found.name, found.source) == ("fc.w", 1)


def test_a_star_stands_for_any_part():
    rule = RenameRule([".experts.*.w1.weight"], [".experts.gate_up_proj"])
    assert renamed(rule, "mlp.experts.12.w1.weight") == "mlp.experts.gate_up_proj"
    assert renamed(rule, "mlp.experts.12.w2.weight") is None


def test_a_captured_group_is_part_of_the_new_name():
    rule = RenameRule([r"^model\.(?:(?!language_model\.))(.+)"], [r"model.language_model.\1"])
    assert renamed(rule, "model.layers.0.q.weight") == "model.language_model.layers.0.q.weight"
    assert renamed(rule, "model.language_model.layers.0.q.weight") is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit.encoder.layer.0.q", "vit.layers.0.q"),
        ("encoder.layer.0.q", "layers.0.q"),  # a file of the inner model alone
        ("decoder.encoder.layer.0.q", None),
    ],
)
def test_a_scope_limits_a_rule_to_one_part(name, expected):
    rule = RenameRule(["^encoder.layer."], ["layers."], scope="", model_prefix="vit")
    assert renamed(rule, name) == expected


def test_a_scope_below_the_inner_model():
    rule = RenameRule(["^a"], ["b"], scope="tower", model_prefix="model")
    assert [renamed(rule, name) for name in ("model.tower.a", "tower.a", "model.a")] == [
        "model.tower.b",
        "tower.b",
        None,
    ]


def test_a_group_waits_for_its_first_pattern():
    rule = RenameRule([r"(\d+).norm0", r"(\d+).norm1"], [r"\1.norm1", r"\1.norm2"], kind="group")
    assert renamed(rule, "7.norm1.weight") is None  # a file that has the new names already
    assert renamed(rule, "7.norm0.weight") == "7.norm1.weight"
    assert renamed(rule, "7.norm1.weight") == "7.norm2.weight"
    rule.reset()
    assert renamed(rule, "7.norm1.weight") is None


def test_an_offset_moves_the_number_of_a_layer():
    rule = RenameRule([r"queries\.(\d+)"], [r"layers.\1.query"], kind="offset", offset=1)
    assert renamed(rule, "queries.4.weight") == "layers.5.query.weight"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layers.6.mixer.q_proj.weight", "layers.3.self_attn.q_proj.weight"),
        ("layers.7.mixer.up_proj.weight", "layers.3.mlp.up_proj.weight"),
        ("layers.7.mlp_alpha", "layers.3.lambda_2"),
        ("layers.6.attn_alpha", "layers.3.lambda_1"),
        ("layers.3.self_attn.q_proj.weight", None),
    ],
)
def test_two_stored_layers_are_the_halves_of_one(name, expected):
    assert renamed(RenameRule(["-"], ["-"], kind="layer pairs"), name) == expected


def test_names_are_sorted_by_the_value_of_their_numbers():
    names = ["layers.10.w", "layers.9.w", "layers.a.w", "x11", "x2"]
    assert sorted(names, key=loading_order) == ["layers.9.w", "layers.10.w", "layers.a.w", "x2", "x11"]
