"""The frozen names of `modules.json`, derived again from the installed transformers."""

from __future__ import annotations

import re

import pytest

from lora_export.names.table import (
    CONV1D_MODULES,
    EMBEDDING_MODULES,
    KNOWN_MODEL_TYPES,
    LINEAR_MODULES,
    MODULES,
    is_embedding,
)
from support import transformers_names
from support.transformers_names import LINEAR_ELSEWHERE, assigned_modules, conv1d_modules, declared_types, sources


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


@pytest.mark.slow
def test_the_file_is_what_make_names_writes():
    derived = transformers_names.encoded_modules(transformers_names.derive_modules())
    assert MODULES.read_text(encoding="utf-8") == derived


@pytest.mark.slow
def test_a_name_of_a_table_of_embeddings_is_that_of_no_linear_layer():
    tables, linear = assigned_modules()
    assert tables - EMBEDDING_MODULES == LINEAR_ELSEWHERE
    assert tables & linear == LINEAR_ELSEWHERE | {"embedding", "embed", "input_embedding"}
    assert len(EMBEDDING_MODULES) > 100


def test_the_last_part_of_a_name_decides():
    assert is_embedding("model.embed_tokens") and is_embedding("wte")
    assert not is_embedding("model.embed_tokens.proj") and not is_embedding("bert.encoder.layer.0.attention.self.query")
