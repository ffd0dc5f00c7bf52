"""Adapters and bases whose names are of different generations. The plan is the same as under the base's own names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lora_export import plan, sums
from lora_export.errors import InputRefused, MatchError
from lora_export.names.architecture import RenameRule, rules_of
from lora_export.plan.spelling import respelled, unknown_names
from support.plans import adapter, holding, matrix, pair
from support.spellings import EXPERTS, KIMI, MIXTRAL, NEW, NOMIC, OLD, VIT, base, experts, filled, fused, numbered


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


def test_an_added_head_keeps_the_prefix_of_the_inner_model():
    inner = rules_of({"model_type": "vit", "architectures": ["ViTModel"]})
    own = holding(pairs=numbered(NEW), replaced={"classifier.weight": np.ones((2, 2), np.float32)})
    made = plan.make([own], base([name.removeprefix("vit.") for name in OLD]), may_add=True, rules=inner)
    assert [made.output_name(step) for step in made.steps] == [*(f"{name}.weight" for name in OLD), "classifier.weight"]


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
    rule = RenameRule(["^norm0", "^norm1"], ["norm1", "norm2"], kind="group")
    return replace(VIT, renames=[rule], converters=[])


# --- What is not known ---


def test_a_base_of_a_newer_transformers_is_named_in_the_error():
    newer = replace(VIT, config={"transformers_version": "99.1.0"})
    with pytest.raises(MatchError, match=r"saved by transformers 99\.1\.0\. This package has the names of"):
        plan.make([adapter(nowhere=pair())], base(OLD), rules=newer)
    assert plan.make([holding(pairs=numbered(OLD))], base(OLD), rules=newer).spellings == ("same",)
    major, minor, *_ = VIT.version.split(".")
    next_minor = replace(VIT, config={"transformers_version": f"{major}.{int(minor) + 1}.0"})
    assert "a newer one may rename more weights" in unknown_names(next_minor)


@pytest.mark.parametrize("version", ["", "nightly", "4.30.0", "5.24.1", None, []])
def test_an_older_or_strange_version_is_no_remark(version):
    assert unknown_names(replace(VIT, config={"transformers_version": version})) == ""


def test_an_architecture_of_unknown_parts_is_named():
    rules = rules_of({"model_type": "timm_wrapper", "architectures": ["TimmWrapperModel"]})
    with pytest.raises(MatchError, match="the parts of TimmWrapperModel are not in the table"):
        plan.make([adapter(nowhere=pair())], base(OLD), rules=rules)


def test_a_model_that_is_never_renamed_needs_no_second_look(monkeypatch):
    bert = rules_of({"model_type": "bert", "architectures": ["BertModel"]})
    monkeypatch.setattr("lora_export.plan.converted_attempts.converted_attempts", None)
    assert plan.make([holding(pairs=numbered(OLD))], base(OLD), rules=bert).spellings == ("same",)


# --- Modules and graphs ---


def test_an_original_adapter_is_respelled_for_a_module():
    own = holding(pairs=numbered(OLD), targets=("query",))
    (found,) = respelled([own], base(NEW), VIT)
    assert list(found.pairs) == NEW and [each.scale for each in found.pairs.values()] == [1, 2, 3, 4]
    assert "conversion mapping" in found.notes[-1]
    assert len(plan.make([found], base(NEW)).steps) == 4


def test_an_adapter_with_the_names_of_the_module_stays_as_it_is():
    own = holding(pairs=numbered(NEW))
    assert respelled([own], base(NEW), VIT)[0] is own
    assert respelled([own], base(OLD), None)[0] is own


def test_a_part_of_a_matrix_of_a_module_is_refused():
    split = {f"encoder.layers.0.self_attn.{name}_proj": filled(1, 2, 4) for name in "qkv"}
    with pytest.raises(MatchError, match="only a merge into a checkpoint"):
        respelled([holding(pairs=split)], fused(), NOMIC)


def test_experts_of_a_module_are_parts_of_its_stacked_parameters():
    pairs, stacked = experts()
    (found,) = respelled([holding(pairs=pairs)], stacked, MIXTRAL)
    made = plan.make([found], stacked)
    for number in range(3):
        changes = {
            name: next(sums.delta(step) for step in made.steps if step.weight.endswith(f"{name}[{number}{rows}]"))
            for name, rows in (("gate_up_proj", ", 0:2"), ("down_proj", ""))
        }
        np.testing.assert_array_equal(changes["gate_up_proj"], pairs[f"{EXPERTS}.{number}.w1"].delta())
        np.testing.assert_array_equal(changes["down_proj"], pairs[f"{EXPERTS}.{number}.w2"].delta())
    assert respelled([found], stacked, MIXTRAL)[0].pairs == found.pairs  # its names are those of the module now
