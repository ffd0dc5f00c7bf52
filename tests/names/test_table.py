"""The frozen facts of transformers, derived again from the installed one."""

from __future__ import annotations

import json
import re

import pytest
import transformers
from packaging.version import Version

from lora_export.names import table
from lora_export.names.table import (
    CONV1D_MODULES,
    EMBEDDING_MODULES,
    KNOWN_MODEL_TYPES,
    LINEAR_MODULES,
    LINEAR_NAMES,
    MODULES,
    is_embedding,
    module_kind,
)
from support import transformers_names
from support.transformers_names import LINEAR_ELSEWHERE, assigned_modules, conv1d_modules, declared_types, sources

SAMPLE = (
    *("ViTForImageClassification", "LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration"),
    *("MixtralForCausalLM", "VisionEncoderDecoderModel", "Dinov2Model", "BertModel", "JinaEmbeddingsV3Model"),
    *("DetrForObjectDetection", "ConditionalDetrForObjectDetection", "TableTransformerForObjectDetection"),
)


def installed_is_newer() -> bool:
    return Version(transformers.__version__) != Version(table.read_table().version)


def written() -> dict:
    """The table as `make names` derives it: rules that are repeated in the file are names of other rules there."""
    raw = json.loads(table.PATH.read_text(encoding="utf-8"))
    lists = {key: value for key, value in raw["rules"].items() if isinstance(value, list)}
    rules = {key: lists[value] if isinstance(value, str) else value for key, value in raw["rules"].items()}
    return {**raw, "rules": rules}


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("GPTNeoXForCausalLM", ["lm_head"]),
        ("BertForSequenceClassification", ["bert.pooler.dense", "classifier"]),
        ("DebertaV2ForSequenceClassification", ["classifier", "pooler.dense"]),
        ("LlamaForSequenceClassification", ["score"]),
    ],
)
def test_a_class_has_modules_that_not_all_of_its_type_have(name: str, own: list[str]) -> None:
    cls = getattr(transformers, name)
    assert table.read_table().modules[cls.config_class.model_type][name] == own
    found = transformers_names.modules_of(transformers_names.build(cls))
    assert set(own) <= found.own | {found.prefix + inner for inner in found.inner}


def test_every_rule_is_that_of_the_installed_transformers():
    derived = transformers_names.derive_rules()
    rules = {key: [dict(rule) for rule in value] for key, value in table.read_table().rules.items()}
    if installed_is_newer():
        new = sorted(set(derived) - set(rules)) + sorted(key for key in rules if derived.get(key) != rules[key])
        pytest.skip(f"transformers {transformers.__version__} is not that of the table; run `make names` for: {new}")
    assert len(derived) > 250
    assert rules == derived


@pytest.mark.parametrize("name", SAMPLE)
def test_an_architecture_has_the_parts_that_transformers_builds(name):
    if installed_is_newer():
        pytest.skip(f"transformers {transformers.__version__} is not that of the table")
    model = transformers_names.build(getattr(transformers, name))
    found = transformers_names.describe(model, transformers_names.derive_rules())
    if found is None:
        assert name not in table.read_table().parts
    else:
        assert [part._asdict() for part in table.read_table().parts[name]] == [
            {"path": part["path"], "architecture": part["class"], "model_type": part["type"], "config": part["config"]}
            for part in found["parts"]
        ]
        assert table.read_table().prefixes[name] == found["prefix"]


@pytest.mark.slow  # builds every model of transformers without memory: two minutes
def test_the_file_is_what_make_names_writes():
    if installed_is_newer():
        pytest.skip(f"transformers {transformers.__version__} is not that of the table")
    assert table.PATH.read_text(encoding="utf-8") == transformers_names.encoded(transformers_names.derive_table())


def test_a_plain_rename_is_a_pair_in_the_file():
    assert written()["rules"]["ViTModel"][0] == ["encoder\\.layer\\.", "layers."]
    assert table.read_table().rules["ViTModel"][0] == {"from": ["encoder\\.layer\\."], "to": ["layers."]}
    assert table.read_table().rules["DeiTModel"] == table.read_table().rules["ViTModel"]


# --- Modules ---


def test_every_model_type_of_transformers_is_known():
    derived = transformers_names.derived_types()
    assert sorted(derived - KNOWN_MODEL_TYPES) == [], "new model types in transformers: run `make names`"
    assert len(KNOWN_MODEL_TYPES) > 800 and "jais" not in KNOWN_MODEL_TYPES


def test_every_conv1d_of_transformers_is_in_the_table():
    derived = transformers_names.with_aliases(conv1d_modules())
    assert len(derived) >= 8 and derived["gpt-sw3"] == derived["gpt2"]
    assert {name: sorted(modules) for name, modules in CONV1D_MODULES.items()} == derived


def test_no_folder_of_transformers_uses_conv1d_unseen():
    # A Conv1D in a list or a Sequential, or under another name, would not be an assignment to an attribute.
    users = {folder for folder, text in sources("*/modeling_*.py") if re.search(r"\bConv1D\(", text)}
    assert {name for folder in users for name in declared_types(folder)} <= set(CONV1D_MODULES)


def test_every_linear_layer_with_a_conv1d_name_is_listed():
    derived = transformers_names.linear_modules(transformers_names.with_aliases(conv1d_modules()))
    assert {name: sorted(modules) for name, modules in LINEAR_MODULES.items()} == derived


def test_names_of_linear_layers_are_those_of_transformers_and_of_no_conv1d():
    assert sorted(LINEAR_NAMES) == transformers_names.linear_names()
    assert {"q_proj", "query", "dense"} <= LINEAR_NAMES and not LINEAR_NAMES & {"c_attn", "c_proj", "c_fc", "q_attn"}


def test_the_kind_of_a_module_is_its_last_name_or_its_place():
    names = ("h.0.attn.c_proj", "h.1.mlp.c_fc", "layers.3.self_attn.q_proj", "net.0", "a.1.net.2", "a.7.net.2")
    assert [*map(module_kind, names)] == ["Conv1D", "Conv1D", "q_proj", "net.0", "a.#.net.2", "a.#.net.2"]


@pytest.mark.slow
def test_the_modules_are_what_make_names_writes():
    derived = transformers_names.encoded_modules(transformers_names.derive_modules())
    assert MODULES.read_text(encoding="utf-8") == derived


@pytest.mark.slow
def test_names_of_embeddings_are_those_of_no_linear_layer():
    tables, linear = assigned_modules()
    assert tables - EMBEDDING_MODULES == LINEAR_ELSEWHERE
    assert tables & linear == LINEAR_ELSEWHERE | {"embedding", "embed", "input_embedding"}
    assert len(EMBEDDING_MODULES) > 100


def test_the_last_part_of_a_name_decides():
    assert is_embedding("model.embed_tokens") and is_embedding("wte")
    assert not is_embedding("model.embed_tokens.proj") and not is_embedding("bert.encoder.layer.0.attention.self.query")
