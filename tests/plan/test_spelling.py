"""Adapters and bases whose names are of different generations. The plan is the same as under the base's own names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from lora_export import plan, sums
from lora_export.errors import InputRefused, MatchError
from lora_export.lora import LoraPair, TokenRows
from lora_export.plan import Layout, Plan
from lora_export.plan.conversion.architecture import rules_of
from support.plans import adapter, holding, matrix, pair, table, vector

VIT = rules_of({"model_type": "vit", "architectures": ["ViTForImageClassification"]})
NOMIC = rules_of({"model_type": "nomic_bert", "architectures": ["NomicBertModel"]})
MIXTRAL = rules_of({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]})
LARA = rules_of({"model_type": "lara_mini", "architectures": ["LaraMiniForCausalLM"]})
KIMI = rules_of({"model_type": "kimi_k25", "architectures": ["KimiK25ForConditionalGeneration"]})

OLD = [f"vit.encoder.layer.{n}.attention.attention.{name}" for n in range(2) for name in ("query", "value")]
NEW = [f"vit.layers.{n}.attention.{name}" for n in range(2) for name in ("q_proj", "v_proj")]
EXPERTS = "model.layers.0.block_sparse_moe.experts"
QKV = "encoder.layers.0.attn.Wqkv"


def numbered(modules: Sequence[str], **fields: Any) -> dict[str, LoraPair]:
    """A pair of its own for each module."""
    return {module: pair(scale=number, **fields) for number, module in enumerate(modules, 1)}


def base(modules: Sequence[str]) -> list:
    return [matrix(f"{module}.weight") for module in modules]


def filled(rank: int, out: int, in_: int, *, seed: int = 0, **fields: Any) -> LoraPair:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(-4, 5, (rank, in_)), rng.integers(-4, 5, (out, rank))
    return LoraPair(a=a.astype(np.float32), b=b.astype(np.float32), scale=1.0, **fields)


def deltas(made: Plan) -> dict[str, np.ndarray]:
    """The change of each stored tensor or part of one, as it is stored."""
    return {step.weight: sums.stored_delta(step, slice(0, step.spec.shape[0])) for step in made.steps}


@pytest.mark.parametrize(
    ("own", "stored", "spelling"),
    [(NEW, OLD, "loaded"), (OLD, NEW, "original"), (OLD, OLD, "same"), (NEW, NEW, "same")],
)
def test_a_pair_finds_its_weight_in_either_generation(own, stored, spelling):
    made = plan.make([holding(pairs=numbered(own))], base(stored), rules=VIT)
    assert {step.weight: step.terms[0].scale for step in made.steps} == {
        f"{module}.weight": number for number, module in enumerate(stored, 1)
    }
    assert made.spellings == (spelling,)
    assert bool(made.notes) is (spelling != "same")
    assert all(
        "conversion mapping of transformers" in note and "ViTForImageClassification" in note for note in made.notes
    )


def test_without_rules_other_names_do_not_fit():
    with pytest.raises(MatchError):
        plan.make([holding(pairs=numbered(NEW))], base(OLD))


def test_a_misfit_has_the_key_of_the_file():
    wrong = holding(pairs={**numbered(NEW), "vit.layers.9.attention.q_proj": pair()}, spelling={NEW[0]: "key"})
    with pytest.raises(MatchError) as refused:
        plan.make([wrong], base(OLD), rules=VIT)
    assert [misfit.key for misfit in refused.value.misfits] == ["vit.layers.9.attention.q_proj"]
    narrow = holding(pairs={**numbered(NEW), NEW[0]: pair([[1, 2]])}, spelling={NEW[0]: "key"})
    with pytest.raises(MatchError, match=r"key: vit\.encoder\.layer\.0"):
        plan.make([narrow], base(OLD), rules=VIT)


def test_two_adapters_of_different_generations_are_one_step():
    old, new = holding("old", pairs=numbered(OLD)), holding("new", pairs=numbered(NEW))
    made = plan.make([old, new], base(OLD), rules=VIT)
    assert [len(step.terms) for step in made.steps] == [2] * len(OLD)
    assert made.spellings == ("same", "loaded")


@pytest.mark.parametrize(("own", "stored"), [(NEW, OLD), (OLD, NEW)])
def test_a_targeted_layer_without_tensors_is_missing(own, stored):
    short = holding(pairs=numbered(own[:-1]), targets=(own[0].rpartition(".")[2], own[1].rpartition(".")[2]))
    with pytest.raises(MatchError) as refused:
        plan.make([short], base(stored), rules=VIT)
    assert [misfit.problem for misfit in refused.value.misfits] == [
        "targeted by the adapter's config, but its file has no tensors for it"
    ]


def test_an_added_head_keeps_the_prefix_of_the_inner_model():
    inner = rules_of({"model_type": "vit", "architectures": ["ViTModel"]})
    own = holding(pairs=numbered(NEW), replaced={"classifier.weight": np.ones((2, 2), np.float32)})
    made = plan.make([own], base([name.removeprefix("vit.") for name in OLD]), may_add=True, rules=inner)
    assert [made.output_name(step) for step in made.steps] == [*(f"{name}.weight" for name in OLD), "classifier.weight"]


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


# --- Parts of stored tensors ---


def fused(out: int = 6, in_: int = 4) -> list:
    return [matrix(f"{QKV}.weight", out, in_), vector(f"{QKV}.bias", out), vector("other", 3)]


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


def experts(count: int = 3, *, inner: int = 2, width: int = 4) -> tuple[dict[str, LoraPair], list]:
    """Pairs for each expert of Mixtral, and the stacked tensors of the loaded model."""
    pairs = {}
    for number in range(count):
        for name, (out, in_) in {"w1": (inner, width), "w2": (width, inner), "w3": (inner, width)}.items():
            pairs[f"{EXPERTS}.{number}.{name}"] = filled(1, out, in_, seed=len(pairs))
    stacked = [
        plan.TensorSpec(f"model.layers.0.mlp.experts.{name}", (count, *shape), "float32", Layout.OUT_IN)
        for name, shape in {"gate_up_proj": (2 * inner, width), "down_proj": (width, inner)}.items()
    ]
    return pairs, stacked


def test_pairs_of_single_experts_are_parts_of_the_stacked_tensor():
    pairs, stacked = experts()
    made = plan.make([holding(pairs=pairs)], stacked, rules=MIXTRAL)
    for spec in stacked:
        expected = np.zeros(spec.shape, np.float32)
        rows = expected.reshape(-1, spec.shape[-1])
        for step in made.by_part[spec.name]:
            rows[step.spec.region.rows] += sums.delta(step)
        for number in range(3):
            own = {
                name: pairs[f"model.layers.0.block_sparse_moe.experts.{number}.{name}"].delta()
                for name in ("w1", "w2", "w3")
            }
            wanted = own["w2"] if "down" in spec.name else np.concatenate([own["w1"], own["w3"]])
            np.testing.assert_array_equal(expected[number], wanted)
    assert "model.layers.0.mlp.experts.gate_up_proj[1, 2:4]" in made.by_weight


def test_pairs_of_some_experts_only_are_refused():
    pairs, stacked = experts()
    some = {name: each for name, each in pairs.items() if ".1." not in name}
    with pytest.raises(MatchError, match="of tensors that the adapter lacks in part"):
        plan.make([holding(pairs=some)], stacked, rules=MIXTRAL)


def test_a_split_by_sizes_of_the_model_is_refused_by_name():
    stored = [matrix("model.layers.0.linear_attn.in_proj.weight", 6, 4)]
    own = holding(pairs={"model.layers.0.linear_attn.in_proj_z": filled(1, 2, 4)})
    with pytest.raises(MatchError, match=r"in_proj_z.*: transformers .* it uses the operation Split"):
        plan.make([own], stored, rules=LARA)


def test_a_table_of_embeddings_is_not_split():
    own = holding(pairs={"layers.0.self_attn.q_proj": table(np.ones((1, 2)), np.ones((4, 1)))})
    with pytest.raises(MatchError, match="splits a table of embeddings"):
        plan.make([own], fused(), rules=NOMIC)


# --- Two answers ---


def test_names_that_fit_in_two_ways_are_refused():
    at = "vision_tower.encoder.blocks.0.mlp"
    stored = [matrix(f"{at}.fc0.weight"), matrix(f"{at}.fc1.weight")]
    # In the loaded model, fc0 is called fc1, and fc1 is called fc2.
    both = holding(pairs=numbered(["model.vision_tower.layers.0.mlp.fc1", "model.vision_tower.layers.0.mlp.fc2"]))
    made = plan.make([both], stored, rules=KIMI)
    assert [step.weight for step in made.steps] == [f"{at}.fc0.weight", f"{at}.fc1.weight"]
    renamed = [matrix("norm0.weight"), matrix("norm1.weight")]
    only = adapter(norm1=pair())
    with pytest.raises(
        InputRefused, match=r"fit the base in two ways: norm1 is norm1\.weight by .*, and norm0\.weight"
    ):
        plan.make([only], renamed, rules=swapped())


def swapped() -> Any:
    """Rules by which norm0 becomes norm1, and norm1 becomes norm2."""
    from dataclasses import replace

    from lora_export.plan.conversion.rename_rules import RenameRule

    rule = RenameRule(["^norm0", "^norm1"], ["norm1", "norm2"], kind="group")
    return replace(VIT, renames=[rule], converters=[])
