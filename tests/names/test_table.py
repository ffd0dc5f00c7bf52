"""The frozen table of transformers' conversion mapping, derived again from the installed transformers."""

from __future__ import annotations

import json

import pytest
import transformers
from packaging.version import Version

from lora_export.names import table
from support import transformers_names

SAMPLE = (
    *("ViTForImageClassification", "LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration"),
    *("MixtralForCausalLM", "VisionEncoderDecoderModel", "Dinov2Model", "BertModel", "JinaEmbeddingsV3Model"),
)


def installed_is_newer() -> bool:
    return Version(transformers.__version__) != Version(table.read_table().version)


def written() -> dict:
    """The table as `make names` derives it: rules that are repeated in the file are names of other rules there."""
    raw = json.loads(table.PATH.read_text(encoding="utf-8"))
    lists = {key: value for key, value in raw["rules"].items() if isinstance(value, list)}
    rules = {key: lists[value] if isinstance(value, str) else value for key, value in raw["rules"].items()}
    return {**raw, "rules": rules}


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
        assert [vars(part) for part in table.read_table().parts[name]] == [
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
