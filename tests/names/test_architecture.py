"""The rules of an architecture, from its config alone, and those that transformers collects from its class."""

from __future__ import annotations

import json

import pytest
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping

from lora_export.names import table
from lora_export.names.architecture import rules_of
from support import transformers_names

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
