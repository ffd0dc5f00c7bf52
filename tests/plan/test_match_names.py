"""Names: prefixes, the nearest name, targeted layers without tensors."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from lora_export import plan
from lora_export.errors import InputRefused, MatchError
from lora_export.lora import ParameterEnding
from lora_export.plan import Layout, TensorSpec
from support.plans import BA, adapter, changes, holding, matrix, misfits, pair, vector


def test_packed_attention_and_bare_parameters_are_found():
    made = plan.make([adapter(attn=pair(), experts=pair())], [matrix("attn.in_proj_weight"), matrix("experts")])
    assert [step.weight for step in made.steps] == ["attn.in_proj_weight", "experts"]


def test_a_prefix_of_the_adapter_is_resolved_with_a_note():
    made = plan.make([adapter(bert__fc=pair())], [matrix("fc.weight")])
    assert changes(made) == {"fc.weight": BA}
    assert made.notes == ("mine: the adapter's names have the prefix `bert.`, which the base's names lack; resolved.",)
    assert made.output_name("fc.weight") == "fc.weight"


def test_a_prefix_of_several_parts_is_resolved():
    made = plan.make([adapter(model__text__fc=pair())], [matrix("fc.weight")])
    assert "`model.text.`" in made.notes[0]


@pytest.mark.parametrize("ending", ["weight", "in_proj_weight"])
def test_a_prefix_of_the_base_is_resolved_with_a_note(ending):
    made = plan.make([adapter(fc=pair())], [matrix(f"model.fc.{ending}")])
    assert changes(made) == {f"model.fc.{ending}": BA}
    assert made.notes == ("mine: the base's names have the prefix `model.`, which the adapter's names lack; resolved.",)


def test_each_adapter_has_its_own_prefix():
    made = plan.make([adapter("a", bert__fc=pair()), adapter("b", fc=pair())], [matrix("fc.weight")])
    assert changes(made) == {"fc.weight": (2 * np.array(BA)).tolist()}


def test_a_prefix_must_fit_every_pair():
    lines = misfits([adapter(bert__fc=pair(), bert__gone=pair())], [matrix("fc.weight"), matrix("fd.weight")])
    assert lines == ["bert.gone: the base has no weight for gone"]


def test_a_misfit_without_the_common_prefix_has_its_own_name():
    mine = holding(
        pairs={"bert.fc": pair(), "bert.fd": pair(), "gpt.zzzzz": pair()}, biases={"gpt.zzzzz": np.ones(2, np.float32)}
    )
    lines = misfits([mine], [matrix("fc.weight"), matrix("fd.weight"), vector("zzzzz.bias")])
    assert lines == [
        "gpt.zzzzz: the base has no weight for gpt.zzzzz; the nearest name is zzzzz.bias",
        "gpt.zzzzz.bias: the base has no gpt.zzzzz.bias, which the adapter changes",
    ]


def test_misfits_have_their_own_names_where_nothing_matches():
    assert misfits([adapter(x__y__z=pair())], [matrix("fc.weight")]) == ["x.y.z: the base has no weight for x.y.z"]


def test_two_prefixes_that_both_fit_are_refused():
    with pytest.raises(InputRefused, match=r"mine fit the base with 2 different prefixes: `a\.`, `a\.b\.`\. Rename"):
        plan.make([adapter(a__b__fc=pair())], [matrix("fc.weight"), matrix("b.fc.weight")])
    base = [matrix("text.fc.weight"), matrix("vision.fc.weight")]
    with pytest.raises(InputRefused, match=r"mine fit the base with 2 different prefixes: `text\.`, `vision\.`\."):
        plan.make([adapter(fc=pair())], base)


def test_one_prefix_found_twice_is_not_ambiguous():
    base = [matrix("m.fc.weight"), matrix("m.fc.in_proj_weight")]
    assert changes(plan.make([adapter(fc=pair())], base)) == {"m.fc.weight": BA}


def test_names_that_fit_as_they_are_get_no_prefix():
    base = [matrix("fc.weight"), matrix("copy.fc.weight")]
    made = plan.make([adapter(fc=pair())], base)
    assert changes(made) == {"fc.weight": BA} and not made.notes


def test_an_added_head_gives_base_tensors_the_adapters_prefix():
    head = holding(pairs={"bert.fc": pair()}, replaced={"classifier.weight": np.ones((5, 3), np.float32)})
    made = plan.make([head], [matrix("fc.weight"), vector("fc.bias")], may_add=True)
    added = made.by_weight["classifier.weight"]
    assert added.added and added.spec == TensorSpec("classifier.weight", (5, 3), "float32", nbytes=60)
    assert [made.output_name(name) for name in (made.by_weight["fc.weight"], "fc.bias", added)] == [
        "bert.fc.weight",
        "bert.fc.bias",
        "classifier.weight",
    ]
    assert made.steps[-1] is added
    assert made.notes[1:] == (
        "the base has no classifier.weight: it is added.",
        "the base's tensors gain the prefix `bert.`, so that the added head finds its model.",
    )


def test_a_replaced_tensor_under_the_prefix_renames_nothing():
    pooler = holding(pairs={"bert.fc": pair()}, replaced={"bert.pooler.weight": np.ones((2, 3), np.float32)})
    made = plan.make([pooler], [matrix("fc.weight"), matrix("pooler.weight")], may_add=True)
    assert [step.weight for step in made.steps] == ["fc.weight", "pooler.weight"]
    assert made.name_prefix == ""


def test_whole_tensors_alone_determine_a_prefix():
    made = plan.make([holding(replaced={"bert.pooler.weight": np.ones((2, 3))})], [matrix("pooler.weight")])
    assert [step.weight for step in made.steps] == ["pooler.weight"]
    assert made.notes == ("mine: the adapter's names have the prefix `bert.`, which the base's names lack; resolved.",)


def test_a_head_without_a_prefix_renames_nothing():
    made = plan.make(
        [holding(pairs={"fc": pair()}, replaced={"score.weight": np.ones((2, 3))})], [matrix("fc.weight")], may_add=True
    )
    assert made.output_name("fc.weight") == "fc.weight"


def test_heads_that_need_different_prefixes_are_refused():
    heads = [
        holding("a", pairs={"bert.fc": pair()}, replaced={"one.weight": np.ones((2, 2))}),
        holding("b", pairs={"roberta.fc": pair()}, replaced={"two.weight": np.ones((2, 2))}),
    ]
    with pytest.raises(InputRefused, match=r"adapters add tensors .*`bert\.` \(a\), `roberta\.` \(b\)\. Merge"):
        plan.make(heads, [matrix("fc.weight")], may_add=True)


def test_the_nearest_name_has_the_same_numbers_where_possible():
    base = [matrix(f"h.{layer}.attn.query.weight") for layer in range(3)]
    lines = misfits([adapter(h__2__attn__query_=pair(), h__7__attn__querie=pair())], base)
    assert [line.rpartition(" ")[2] for line in lines] == ["h.2.attn.query.weight", "h.0.attn.query.weight"]


def tower(*names: str) -> list[TensorSpec]:
    return [matrix(f"{name}.weight") for name in names]


@pytest.mark.fault(17)
def test_a_targeted_layer_without_tensors_is_a_misfit():
    base = tower("layer.0.query", "layer.1.query", "layer.2.query", "layer.0.key")
    mine = holding(pairs={"layer.0.query": pair(), "layer.2.query": pair()}, targets=("query",))
    with pytest.raises(MatchError, match="1 of 3 targets do not fit") as refused:
        plan.make([mine], base)
    assert [str(misfit) for misfit in refused.value.misfits] == [
        "layer.1.query: targeted by the adapter's config, but its file has no tensors for it"
    ]


@pytest.mark.fault(17)
def test_a_target_without_any_tensors_is_a_misfit():
    mine = holding(pairs={"layer.0.query": pair()}, targets=("query", "value"))
    assert misfits([mine], tower("layer.0.query", "layer.0.value"))[0].startswith("layer.0.value: targeted")


def test_a_targeted_parameter_is_no_module():
    """PEFT's `target_parameters`: `down_proj` are the stacked experts, and not a layer with this name."""
    mine = holding(pairs={"layer.0.query": pair()}, targets=("query", ParameterEnding("down_proj")))
    base = [*tower("layer.0.query", "layer.0.mlp.down_proj"), vector("layer.0.mlp.down_proj.bias")]
    assert len(plan.make([mine], base).steps) == 1
    experts = TensorSpec("layer.0.experts.down_proj", (2, 2, 3), "float32", layout=Layout.OTHER)
    assert misfits([mine], [*base, experts])[0].startswith("layer.0.experts.down_proj: targeted by")
    apart = tower("layer.0.experts.0.w1", "layer.0.experts.1.w1", "layer.1.experts.0.w1")
    found = misfits([mine], [*base, *apart])
    assert [misfit.partition(":")[0] for misfit in found] == ["layer.0.experts", "layer.1.experts"]


def test_missing_targets_are_found_under_a_prefix():
    mine = holding(pairs={"bert.layer.0.query": pair()}, targets=("query",))
    assert misfits([mine], tower("layer.0.query", "layer.1.query"))[0].startswith("layer.1.query: targeted")


def test_a_replaced_module_under_a_prefix_is_not_missing():
    mine = holding(
        pairs={"bert.layer.0.fc": pair()}, replaced={"bert.layer.1.fc.weight": np.ones((2, 3))}, targets=("fc",)
    )
    assert len(plan.make([mine], tower("layer.0.fc", "layer.1.fc")).steps) == 2


def test_another_tower_with_the_same_endings_is_not_missing():
    base = tower("text.layer.0.query", "vision.layer.0.query", "layer.0.subquery")
    mine = holding(pairs={"text.layer.0.query": pair()}, targets=("query",))
    assert len(plan.make([mine], base).steps) == 1


def test_biases_norms_and_replaced_modules_are_not_missing():
    base = [*tower("layer.0.fc"), vector("layer.1.fc.weight"), matrix("layer.2.fc.weight")]
    mine = holding(
        pairs={"layer.0.fc": pair()}, replaced={"layer.2.fc.weight": np.ones((2, 3), np.float32)}, targets=("fc",)
    )
    assert len(plan.make([mine], base).steps) == 2


@pytest.mark.fault(15)
def test_misfits_of_thousands_of_experts_are_found_quickly():
    def names(kinds: str) -> list[str]:
        return [f"layers.{i}.experts.{j}.{kind}_proj" for i in range(30) for j in range(100) for kind in kinds]

    begun = time.process_time()
    lines = misfits([holding(pairs={name: pair() for name in names("ab")})], tower(*names("cd")))
    assert len(lines) == 6000
    assert lines[-1].endswith("the nearest name is layers.29.experts.99.d_proj.weight")
    assert time.process_time() - begun < 5


@pytest.mark.fault(15)
def test_misfits_of_random_names_are_found_quickly():
    letters = random.Random(0)
    strange, base = (["".join(letters.choices("abcdefgh.", k=60)) for _ in range(500)] for _ in range(2))
    begun = time.process_time()
    assert len(misfits([holding(pairs={name: pair() for name in strange})], tower(*base))) == 500
    assert time.process_time() - begun < 10


@pytest.mark.fault(17)
def test_thousands_of_missing_targets_are_found_quickly():
    base = tower(*(f"{i}.a" for i in range(5000)), *(f"x{i}" for i in range(5000)))
    mine = holding(pairs={"0.a": pair()}, targets=("a", *(f"x{i}" for i in range(5000))))
    begun = time.process_time()
    assert len(misfits([mine], base)) == 9999
    assert time.process_time() - begun < 5
