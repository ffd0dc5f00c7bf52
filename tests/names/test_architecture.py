"""The rules for the model that a config describes, and the names that one rule makes."""

from __future__ import annotations

import json

import pytest
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping

from lora_export.names import table
from lora_export.names.architecture import RenameRule, loading_order, rules_of
from support import transformers_names


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


SAME_VERSION = transformers.__version__ == table.read_table().version
SAMPLE = (
    *("ViTForImageClassification", "ViTModel", "LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration"),
    *("Qwen2_5_VLForConditionalGeneration", "MixtralForCausalLM", "PaliGemmaForConditionalGeneration", "BertModel"),
    *("VisionEncoderDecoderModel", "CLIPModel", "JinaEmbeddingsV3Model", "Qwen3MoeForCausalLM", "Idefics3Model"),
)
# Their parts differ from those that transformers builds by default.
UNLIKE = {
    *("MaskFormerForInstanceSegmentation", "MaskFormerModel"),  # their config calls the parts of two kinds by one type
    *("BarkCausalModel", "PPDocLayoutV2ReadingOrder", "Qwen3OmniMoeCode2Wav", "Qwen3OmniMoeCode2WavTransformerModel"),
}

pytestmark = pytest.mark.skipif(not SAME_VERSION, reason="the table is that of another transformers")


def config_of(model: transformers.PreTrainedModel) -> dict:
    return json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}


def found_rules(config: dict) -> tuple[list, list]:
    rules = rules_of(config)
    assert rules is not None
    return tuple(
        [(list(rule.sources), list(rule.targets), rule.scope, rule.model_prefix) for rule in each]
        for each in (rules.renames, rules.converters)
    )


def rules_of_transformers(model: transformers.PreTrainedModel) -> tuple[list, list]:
    both: tuple[list, list] = [], []
    for one in get_model_conversion_mapping(model):
        is_converter = isinstance(one, transformers.core_model_loading.WeightConverter)
        prefix = "" if one.scope_prefix is None else one.base_model_prefix
        both[is_converter].append((one.source_patterns, one.target_patterns, one.scope_prefix, prefix))
    return both


@pytest.mark.parametrize("name", SAMPLE)
def test_the_rules_are_those_of_the_class_in_its_order(name):
    model = transformers_names.build(getattr(transformers, name))
    assert found_rules(config_of(model)) == rules_of_transformers(model)


@pytest.mark.slow  # builds every model of transformers without memory
def test_the_rules_of_every_class():
    checked, wrong = 0, set()
    for cls in transformers_names.model_classes():
        if cls.__name__ in table.read_table().unbuilt:
            continue
        model = transformers_names.build(cls)
        checked += 1
        if not model.config.model_type or found_rules(config_of(model)) != rules_of_transformers(model):
            wrong.add(cls.__name__)
    assert checked > 1600
    assert wrong == UNLIKE


def test_a_part_of_another_type_brings_its_own_rules():
    llava = transformers.LlavaConfig(text_config=transformers.MixtralConfig(num_hidden_layers=1))
    model = transformers_names.build(transformers.LlavaForConditionalGeneration, llava)
    found, expected = found_rules(config_of(model)), rules_of_transformers(model)
    assert found == expected
    assert ([".experts.*.w2.weight"], [".experts.down_proj"], "language_model", "model") in found[1]
    plain = transformers_names.build(transformers.LlavaForConditionalGeneration)
    assert found_rules(config_of(plain))[1] == []


def test_a_config_without_architectures_is_its_inner_model():
    assert rules_of({"model_type": "vit"}).architecture == "ViTModel"


@pytest.mark.parametrize("config", [{}, {"model_type": ""}, {"model_type": 3}, {"architectures": ["ViTModel"]}])
def test_a_config_of_no_type_has_no_rules(config):
    assert rules_of(config) is None


@pytest.mark.parametrize("architectures", [None, [], [1], "ViTModel", {"a": 1}])
def test_a_damaged_list_of_architectures_is_ignored(architectures):
    rules = rules_of({"model_type": "vit", "architectures": architectures})
    assert rules is not None and rules.architecture == "ViTModel"


def test_an_unknown_architecture_has_only_the_rules_for_all():
    rules = rules_of({"model_type": "jais", "architectures": ["JAISLMHeadModel"]})
    assert rules is not None and not rules.converters
    assert {rule.scope for rule in rules.renames} == {None}
    assert len(rules.renames) == len(table.read_table().rules["legacy"])


def test_a_part_inside_a_part_of_its_class_has_the_same_rules():
    config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    nested = rules_of({**config, "text_config": {"model_type": "llava"}})
    assert nested is not None
    # The outer LlavaModel is at `model`, the inner one at `model.language_model`.
    assert [rule.scope for rule in nested.renames if list(rule.sources) == ["^language_model.model"]] == [""]
