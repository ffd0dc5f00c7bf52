"""The frozen tables of model types, derived again from the installed transformers."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from lora_export.weights.model_types import CONV1D_MODULES, KNOWN_MODEL_TYPES, LINEAR_MODULES

MODELS = Path(transformers.__file__).parent / "models"
MODEL_TYPE = re.compile(r'^    model_type\s*(?::[^=]+)?=\s*"([^"]+)"', re.MULTILINE)


def sources(pattern: str) -> Iterator[tuple[str, str]]:
    """The folder and the text of each file of transformers that matches."""
    for path in MODELS.glob(pattern):
        yield path.parent.name, path.read_text(encoding="utf-8")


def model_types(folder: str = "*") -> set[str]:
    """The types that the configs in a folder of transformers declare."""
    return {name for _, text in sources(f"{folder}/configuration_*.py") for name in MODEL_TYPE.findall(text)}


def attributes_of(text: str, kind: str) -> Iterator[str]:
    """The attributes to which this source assigns a new `kind(...)`."""
    for node in ast.walk(ast.parse(text)):
        call = node.value if isinstance(node, ast.Assign) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == kind:
            assert isinstance(node, ast.Assign)
            yield from (target.attr for target in node.targets if isinstance(target, ast.Attribute))


def conv1d_modules() -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for folder, text in sources("*/modeling_*.py"):
        for name in attributes_of(text, "Conv1D") if "Conv1D" in text else ():
            found.setdefault(folder, set()).add(name)
    return {name: frozenset(modules) for folder, modules in found.items() for name in model_types(folder)}


def test_every_model_type_of_transformers_is_known():
    assert (model_types() | set(CONFIG_MAPPING_NAMES)) - KNOWN_MODEL_TYPES == set()
    assert len(KNOWN_MODEL_TYPES) > 800 and "jais" not in KNOWN_MODEL_TYPES


def test_every_conv1d_of_transformers_is_in_the_table():
    derived = conv1d_modules()
    assert len(derived) >= 7
    assert {name: modules for name, modules in CONV1D_MODULES.items() if name != "gpt-sw3"} == derived
    assert CONV1D_MODULES["gpt-sw3"] == derived["gpt2"] and CONFIG_MAPPING_NAMES["gpt-sw3"] == "GPT2Config"


def test_no_folder_of_transformers_uses_conv1d_unseen():
    # A Conv1D in a list or a Sequential, or under another name, would not be an assignment to an attribute.
    users = {folder for folder, text in sources("*/modeling_*.py") if re.search(r"\bConv1D\(", text)}
    assert {name for folder in users for name in model_types(folder)} <= set(CONV1D_MODULES)


def test_every_linear_layer_with_a_conv1d_name_is_listed():
    names = frozenset().union(*CONV1D_MODULES.values())
    found: dict[str, frozenset[str]] = {}
    for folder, text in sources("*/modeling_*.py"):
        if modules := names & set(re.findall(r"self\.(\w+) = ", text)):
            found |= dict.fromkeys(model_types(folder) - set(CONV1D_MODULES), modules)
    assert found == LINEAR_MODULES
