"""The frozen names of tables of embeddings, derived again from the installed transformers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import transformers

from lora_export.plan.embedding_names import EMBEDDING_MODULES, is_embedding

MODELS = Path(transformers.__file__).parent / "models"
# Names of tables in some models, and of linear layers in others, BERT among them.
LINEAR_ELSEWHERE = {"query", "reference_points"}


def assigned() -> tuple[set[str], set[str]]:
    """The attributes to which transformers assigns an nn.Embedding or a class made from it, and a linear layer."""
    tables: set[str] = set()
    linear: set[str] = set()
    for path in MODELS.glob("*/modeling_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        own = {cls.name for cls in classes if "nn.Embedding" in map(ast.unparse, cls.bases)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
                continue
            kind = ast.unparse(node.value.func)
            attributes = (target for target in node.targets if isinstance(target, ast.Attribute))
            names = {target.attr for target in attributes if ast.unparse(target.value) == "self"}
            tables |= names if kind in own | {"nn.Embedding"} else set()
            linear |= names if kind.endswith(("Linear", "Conv1D")) else set()
    return tables, linear


@pytest.mark.slow
def test_the_table_is_that_of_transformers() -> None:
    tables, linear = assigned()
    assert tables - EMBEDDING_MODULES == LINEAR_ELSEWHERE
    assert tables & linear == LINEAR_ELSEWHERE | {"embedding", "embed", "input_embedding"}
    assert len(EMBEDDING_MODULES) > 100


def test_the_last_part_of_a_name_decides() -> None:
    assert is_embedding("model.embed_tokens") and is_embedding("wte")
    assert not is_embedding("model.embed_tokens.proj") and not is_embedding("bert.encoder.layer.0.attention.self.query")
