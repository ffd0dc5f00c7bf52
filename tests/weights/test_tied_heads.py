"""The frozen names of classes with other output embeddings, derived again from the installed transformers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import transformers

from lora_export.weights.tied_heads import LANGUAGE_MODELS, WITH_OTHER_HEADS, tied_head

MODELS = Path(transformers.__file__).parent / "models"


def tied_by_class() -> Iterator[tuple[str, list[str]]]:
    """Each class of language models, with the names of the parameters that it ties."""
    for path in MODELS.glob("*/modeling_*.py"):
        for cls in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(cls, ast.ClassDef) or not cls.name.endswith(LANGUAGE_MODELS):
                continue
            for node in cls.body:
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_tied_weights_keys":
                    keys = node.value.keys if isinstance(node.value, ast.Dict) else []
                    yield cls.name, [key.value for key in keys if isinstance(key, ast.Constant)]


def test_the_table_is_that_of_transformers() -> None:
    found = dict(tied_by_class())
    usual = {name for name, keys in found.items() if keys == ["lm_head.weight"]}
    assert {name for name, keys in found.items() if keys} - usual == WITH_OTHER_HEADS
    assert len(usual) > 100


def test_the_head_of_a_class_that_is_not_known_has_no_name() -> None:
    assert tied_head("LlamaForCausalLM") == tied_head("GPT2LMHeadModel") == "lm_head"
    assert [tied_head(name) for name in ("BertLMHeadModel", "LlavaForConditionalGeneration", "")] == ["", "", ""]
