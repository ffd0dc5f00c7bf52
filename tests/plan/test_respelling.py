"""The tensors of an adapter under the names of a base of another generation."""

from __future__ import annotations

import numpy as np
import pytest

from lora_export import plan, sums
from lora_export.errors import MatchError
from lora_export.lora import TokenRows
from lora_export.names.architecture import rules_of
from support.plans import holding, matrix, table, vector
from support.spellings import LARA, NEW, NOMIC, OLD, QKV, VIT, base, filled, fused, numbered


def test_biases_and_whole_tensors_are_renamed_too():
    shift, whole = np.array([1, 2], np.float32), np.full((2, 3), 5, np.float32)
    own = holding(pairs=numbered(NEW[:1]), biases={NEW[0]: shift}, replaced={"vit.layers.1.mlp.fc1.weight": whole})
    stored = [*base(OLD[:1]), vector(f"{OLD[0]}.bias"), matrix("vit.encoder.layer.1.intermediate.dense.weight")]
    made = plan.make([own], stored, rules=VIT)
    assert made.by_weight[f"{OLD[0]}.bias"].shift.tolist() == [1, 2]
    assert (made.by_weight["vit.encoder.layer.1.intermediate.dense.weight"].replace == whole).all()


def test_tables_of_embeddings_and_their_rows_are_renamed():
    rules = rules_of({"model_type": "nomic_bert", "architectures": ["NomicBertModel"]})
    name = "encoder.layers.0.norm1"
    rows = TokenRows(np.array([1]), np.ones((1, 3), np.float32))
    own = holding(token_rows={"layers.0.post_attention_layernorm.weight": rows})
    (step,) = plan.make([own], [matrix(f"{name}.weight")], rules=rules).steps
    assert step.weight == f"{name}.weight" and step.replaces_only_rows


def test_q_k_and_v_are_rows_of_the_fused_weight():
    pairs = {f"layers.0.self_attn.{each}_proj": filled(2, 2, 4, seed=n) for n, each in enumerate("qkv")}
    made = plan.make([holding(pairs=pairs)], fused(), rules=NOMIC)
    assert [step.weight for step in made.steps] == [f"{QKV}.weight[{rows}]" for rows in ("0:2", "2:4", "4:6")]
    for step, own in zip(made.steps, pairs.values(), strict=True):
        np.testing.assert_array_equal(sums.delta(step), own.delta())
    assert made.kept == (f"{QKV}.bias", "other")
    assert [step.spec.region.rows for step in made.by_part[f"{QKV}.weight"]] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert "Wqkv.weight[2:4]  [2 x 4 float32]" in str(made)


def test_the_fused_pair_is_split_for_q_k_and_v():
    whole = filled(2, 6, 4, magnitude=np.arange(1, 7))
    stored = [matrix(f"layers.0.self_attn.{each}_proj.weight", 2, 4) for each in "qkv"]
    made = plan.make([holding(pairs={QKV: whole})], stored, rules=NOMIC)
    assert made.spellings == ("original",)
    np.testing.assert_array_equal(np.concatenate([sums.delta(step) for step in made.steps]), whole.delta())
    assert [step.magnitude.tolist() for step in made.steps] == [[1, 2], [3, 4], [5, 6]]


def test_biases_and_whole_tensors_change_parts():
    q, k = "layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj"
    whole = np.arange(8, dtype=np.float32).reshape(2, 4)
    own = holding(pairs={q: filled(1, 2, 4)}, biases={q: np.array([1, 2], np.float32)}, replaced={f"{k}.weight": whole})
    made = plan.make([own], fused(), rules=NOMIC)
    assert made.by_weight[f"{QKV}.bias[0:2]"].shift.tolist() == [1, 2]
    assert (made.by_weight[f"{QKV}.weight[2:4]"].replace == whole).all()


def test_the_whole_and_a_part_do_not_change_together():
    q = holding("q", pairs={"layers.0.self_attn.q_proj": filled(2, 2, 4)})
    qkv = holding("qkv", pairs={QKV: filled(2, 6, 4)})
    with pytest.raises(MatchError, match=r"q changes .*Wqkv\.weight\[0:2\], and qkv changes .*Wqkv\.weight, which"):
        plan.make([q, qkv], fused(), rules=NOMIC)


def test_a_split_by_sizes_of_the_model_is_refused_by_name():
    stored = [matrix("model.layers.0.linear_attn.in_proj.weight", 6, 4)]
    own = holding(pairs={"model.layers.0.linear_attn.in_proj_z": filled(1, 2, 4)})
    with pytest.raises(
        MatchError, match=r"in_proj_z.*: transformers .* it splits 6 rows, and the sizes of .*in_proj_qkv"
    ):
        plan.make([own], stored, rules=LARA)


def test_a_table_of_embeddings_is_not_split():
    own = holding(pairs={"layers.0.self_attn.q_proj": table(np.ones((1, 2)), np.ones((4, 1)))})
    with pytest.raises(MatchError, match="splits a table of embeddings"):
        plan.make([own], fused(), rules=NOMIC)
