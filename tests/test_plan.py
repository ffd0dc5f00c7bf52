"""The plan: what lands where, on bases that are a list of names and shapes. Changes are solved by hand."""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np
import pytest

from lora_export import plan
from lora_export.errors import InputRefused, MatchError
from lora_export.lora import EVERY_ROW, Adapter, LoraPair, Rows
from lora_export.plan import Layout, Plan, Step, TensorSpec, Term

A = [[1, 2, 3]]  # (rank 1, in 3)
B = [[1], [10]]  # (out 2, rank 1)
BA = [[1, 2, 3], [10, 20, 30]]


def pair(a: Any = A, b: Any = B, scale: float = 1.0) -> LoraPair:
    return LoraPair(a=np.array(a), b=np.array(b), scale=scale)


def adapter(name: str = "mine", **pairs: LoraPair) -> Adapter:
    """An adapter of these modules; a double underscore stands for a dot."""
    return Adapter(name, "peft", {module.replace("__", "."): pair for module, pair in pairs.items()})


def holding(name: str = "mine", **fields: Any) -> Adapter:
    return Adapter(name, "peft", fields.pop("pairs", {}), **fields)


def matrix(name: str, out: int = 2, in_: int = 3, *, layout: Layout = Layout.OUT_IN, **fields: Any) -> TensorSpec:
    return TensorSpec(name, (out, in_), fields.pop("dtype", "float32"), layout, **fields)


def vector(name: str, size: int = 2) -> TensorSpec:
    return TensorSpec(name, (size,), "float32")


def misfits(adapters: list[Adapter], base: list[TensorSpec], **options: Any) -> list[str]:
    with pytest.raises(MatchError) as refused:
        plan.make(adapters, base, **options)
    return list(map(str, refused.value.misfits))


def changes(made: Plan) -> dict[str, list[Any]]:
    return {step.weight: step.delta().tolist() for step in made.steps}


# --- What lands ---


def test_each_pair_lands_on_its_modules_weight_and_the_rest_is_kept():
    base = [matrix("fc.weight"), vector("fc.bias"), matrix("other.weight")]
    made = plan.make([adapter(fc=pair(scale=0.5))], base)
    assert changes(made) == {"fc.weight": [[0.5, 1, 1.5], [5, 10, 15]]}
    assert made.kept == ("fc.bias", "other.weight")
    assert not made.notes


def test_several_adapters_on_one_weight_are_one_step_and_add_up():
    first, second = (
        adapter("first", fc=pair()),
        adapter("second", fc=pair(a=[[0, 0, 1], [1, 0, 0]], b=[[1, 0], [0, 2]])),
    )
    made = plan.make([first, second], [matrix("fc.weight")], strengths=[2, -1])
    assert len(made.steps) == 1
    # 2 * BA - [[0, 0, 1], [2, 0, 0]]
    assert changes(made) == {"fc.weight": [[2, 4, 5], [18, 40, 60]]}


def test_steps_follow_the_bases_order_not_the_adapters():
    made = plan.make([adapter(b=pair(), a=pair())], [matrix("a.weight"), matrix("b.weight")])
    assert [step.weight for step in made.steps] == ["a.weight", "b.weight"]


def test_packed_attention_and_bare_parameters_are_found():
    made = plan.make([adapter(attn=pair(), experts=pair())], [matrix("attn.in_proj_weight"), matrix("experts")])
    assert [step.weight for step in made.steps] == ["attn.in_proj_weight", "experts"]


def test_a_square_weight_that_is_stored_in_out_gets_the_transposed_change():
    # Only the layout tells: the shapes would fit both ways.
    there = adapter(fc=pair(a=[[1, 2]], b=[[1], [10]]))
    for layout, stored in ((Layout.OUT_IN, [[1, 2], [10, 20]]), (Layout.IN_OUT, [[1, 10], [2, 20]])):
        (step,) = plan.make([there], [matrix("fc.weight", 2, 2, layout=layout)]).steps
        assert step.stored_delta(slice(None)).tolist() == stored
        assert step.stored_delta(slice(1, 2)).tolist() == stored[1:]
        assert step.delta().tolist() == [[1, 2], [10, 20]]  # always (out, in)


def test_an_oblong_weight_that_is_stored_in_out_is_matched_by_its_out_in_view():
    (step,) = plan.make([adapter(fc=pair())], [matrix("fc.weight", 3, 2, layout=Layout.IN_OUT)]).steps
    assert step.stored_delta(slice(None)).tolist() == np.transpose(BA).tolist()


def test_two_adapters_on_a_weight_stored_in_out_add_up_in_its_layout():
    base = [matrix("fc.weight", 3, 2, layout=Layout.IN_OUT)]
    made = plan.make([adapter("a", fc=pair()), adapter("b", fc=pair())], base, strengths=[1, 2])
    assert made.steps[0].stored_delta(slice(None)).tolist() == (3 * np.transpose(BA)).tolist()


def test_biases_shift_by_the_sum_over_adapters_at_their_strengths():
    shift = np.array([1, 2], np.float32)
    one = holding("one", pairs={"fc": pair()}, biases={"fc": shift})
    two = holding("two", pairs={"fc": pair()}, biases={"fc": shift})
    made = plan.make([one, two], [matrix("fc.weight"), vector("fc.bias")], strengths=[1, 10])
    step = made.by_weight["fc.bias"]
    assert step.delta().tolist() == [11, 22]
    assert step.stored_delta(slice(1, 2)).tolist() == [22]


def test_a_whole_tensor_takes_the_place_of_the_bases():
    head, place = np.ones((2, 3), np.float16), matrix("head.weight", file="model.safetensors")
    made = plan.make([holding(replaced={"head.weight": head})], [place, vector("head.bias")])
    (step,) = made.steps
    assert step.replace is head and step.spec is place and not step.added
    assert made.kept == ("head.bias",)


# --- Embeddings, convolutions, DoRA ---


def table(a: Any = A, b: Any = B, **fields: Any) -> LoraPair:
    return LoraPair(a=np.array(a), b=np.array(b), scale=1.0, embedding=True, **fields)


@pytest.mark.parametrize("layout", [Layout.EMBEDDING, Layout.MATRIX])
def test_an_embeddings_pair_lands_on_rows_of_words(layout):
    (step,) = plan.make([adapter(emb=table())], [matrix("emb.weight", 3, 2, layout=layout)]).steps  # 3 words, 2 wide
    assert step.spec.layout is Layout.EMBEDDING
    assert step.delta().tolist() == BA
    assert step.stored_delta(slice(1, 3)).tolist() == np.transpose(BA)[1:].tolist()


def test_what_a_matrix_is_that_only_the_adapter_can_tell_stands_in_the_step():
    (step,) = plan.make([adapter(fc=pair())], [matrix("fc.weight", layout=Layout.MATRIX)]).steps
    assert (step.spec.layout, step.stored_delta(slice(None)).tolist()) == (Layout.OUT_IN, BA)


def test_pairs_of_embeddings_and_of_linear_layers_are_not_taken_for_one_another():
    # All are square: no shape would tell.
    square = {"a": [[1, 2]], "b": [[1], [10]]}
    there = adapter(emb=table(**square), fc=pair(**square), other=table(**square))
    base = [
        matrix("emb.weight", 2, 2),
        matrix("fc.weight", 2, 2, layout=Layout.EMBEDDING),
        matrix("other.weight", 2, 2, layout=Layout.IN_OUT),
    ]
    assert misfits([there], base) == [
        "emb: emb.weight is the weight of a linear layer, the adapter was trained on an embedding",
        "fc: fc.weight is an embedding's, the adapter was trained on a linear layer",
        "other: other.weight is the weight of a linear layer, the adapter was trained on an embedding",
    ]
    two = [adapter("one", fc=pair(**square)), adapter("two", fc=table(**square))]
    assert misfits(two, [matrix("fc.weight", 2, 2, layout=Layout.MATRIX)]) == [
        "fc.weight: for two fc.weight is an embedding, for one a linear layer"
    ]


def test_a_table_of_another_size_is_told_in_rows_and_width():
    assert misfits([adapter(emb=table())], [matrix("emb.weight", 4, 2, layout=Layout.MATRIX)]) == [
        "emb: emb.weight is (2, 4) (width, rows), the adapter wants (2, 3)"
    ]


def test_dora_shares_its_weight_with_no_other_adapter():
    scaled = LoraPair(a=np.array(A), b=np.array(B), scale=1.0, magnitude=np.array([1, 2]))
    for order in ([pair(), scaled], [scaled, pair()], [scaled, scaled]):
        there = [adapter(name, fc=pair, other=pair) for name, pair in zip(("one", "two"), order, strict=True)]
        lines = misfits(there, [matrix("fc.weight"), matrix("other.weight")])
        assert lines == [
            f"{name}: one and two both change {name}, and DoRA rescales all that it finds there: what comes out "
            "depends on the order. Merge one, and the other into what comes out, if that is meant"
            for name in ("fc.weight", "other.weight")
        ]


def test_dora_on_one_weight_and_another_adapter_on_another_are_one_plan():
    scaled = LoraPair(a=np.array(A), b=np.array(B), scale=1.0, magnitude=np.array([1, 2]))
    made = plan.make([adapter("one", a=scaled), adapter("two", b=pair())], [matrix("a.weight"), matrix("b.weight")])
    assert [step.magnitude is None for step in made.steps] == [False, True]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dora_gives_each_output_its_length(dtype):
    # W + 2 * BA = [[3, 4, 0], [0, 0, 5]], whose rows are 5 long.
    scaled = LoraPair(a=np.array([[1, 2, 0]]), b=np.array([[1], [0]]), scale=1.0, magnitude=np.array([10, 20]))
    (step,) = plan.make([adapter(fc=scaled)], [matrix("fc.weight")], strengths=[2]).steps
    weight = np.array([[1, 0, 0], [0, 0, 5]], dtype)
    total, change = step.carried_out(weight)
    assert total.tolist() == [[6, 8, 0], [0, 0, 20]]
    assert change.tolist() == [[5, 8, 0], [0, 0, 15]]
    assert total.dtype == dtype and weight.tolist() == [[1, 0, 0], [0, 0, 5]]


def test_dora_on_an_output_without_a_direction_is_refused():
    scaled = LoraPair(a=np.array([[1, 2, 0]]), b=np.array([[1], [0]]), scale=1.0, magnitude=np.array([10, 20]))
    (step,) = plan.make([adapter(fc=scaled)], [matrix("fc.weight")]).steps
    with pytest.raises(InputRefused, match=r"^fc\.weight: W \+ sBA is zero in 2 of its outputs, to which DoRA cannot"):
        step.carried_out(np.array([[-1, -2, 0], [0, 0, 0]], np.float32))


def test_a_pair_stands_on_the_whole_tensor_that_its_own_adapter_brings():
    whole = np.zeros((3, 2), np.float32)
    base = [matrix("emb.weight", 3, 2, layout=Layout.MATRIX)]
    made = plan.make([holding(pairs={"emb": table()}, replaced={"emb.weight": whole})], base)
    (step,) = made.steps
    assert step.replace is whole and step.terms and not step.is_whole
    assert str(made).splitlines() == [
        "1 weights changed",
        "  emb.weight  [3 x 2 float32]  1 * B A (rank 1, mine), an embedding's, to the whole tensor that the adapter "
        "brings",
    ]
    apart = [holding(replaced={"emb.weight": whole}), adapter("other", emb=table())]
    assert misfits(apart, base) == [
        "emb.weight: mine replaces emb.weight as a whole, other adds to it; only one can hold"
    ]


def rows(*indices: int, width: int = 3) -> Rows:
    return Rows(np.array(indices), np.ones((len(indices), width), np.float32) * (1 + np.array(indices)[:, None]))


def test_rows_of_several_adapters_are_one_step_where_no_row_is_taken_twice():
    one, two = (holding(name, rows={"emb.weight": there}) for name, there in (("one", rows(4, 1)), ("two", rows(2))))
    made = plan.make([one, two], [matrix("emb.weight", 5, layout=Layout.MATRIX)])
    (step,) = made.steps
    assert (step.rows.indices.tolist(), step.rows.values[:, 0].tolist()) == ([4, 1, 2], [5, 2, 3])
    assert step.is_whole and step.brings_rows
    assert str(made).splitlines() == [
        "1 tables of which rows are replaced",
        "  emb.weight  [5 x 3 float32]  3 rows replaced",
    ]
    table = np.array(np.zeros((2, 3)))  # the rows 1 and 2 of five
    step.rows.put_into(table, 1)
    assert table.tolist() == [[2, 2, 2], [3, 3, 3]]


def test_rows_stand_in_the_whole_tensor_that_comes_with_them():
    whole = np.zeros((5, 3), np.float32)
    made = plan.make([holding(rows={"emb.weight": rows(1)}, replaced={"emb.weight": whole})], [matrix("emb.weight", 5)])
    assert made.steps[0].replace is whole and not made.steps[0].brings_rows
    assert str(made).splitlines()[1] == "  emb.weight  [5 x 3 float32]  replaced, then 1 rows replaced"


def test_rows_that_do_not_fit_are_misfits():
    base = [matrix("emb.weight", 5), matrix("wide.weight", 5, 4), matrix("small.weight", dtype="int8"), vector("bias")]
    names = ("emb.weight", "wide.weight", "small.weight", "bias", "other.weight")
    assert misfits([holding(rows=dict.fromkeys(names, rows(5)))], base) == [
        "emb.weight: emb.weight has 5 rows, the adapter replaces row 5",
        "wide.weight: wide.weight is (5, 4) float32, the adapter replaces rows of 3 floats",
        "small.weight: small.weight is (2, 3) int8, the adapter replaces rows of 3 floats",
        "bias: bias is (2,) float32, the adapter replaces rows of 3 floats",
        "other.weight: there is no other.weight to replace rows of",
    ]


def test_rows_share_their_table_with_nobody_who_wants_the_same():
    one, two = (holding(name, rows={"emb.weight": there}) for name, there in (("one", rows(4, 1)), ("two", rows(1, 2))))
    three = adapter("three", emb=table(a=[[1] * 5], b=[[1]] * 3))
    four = holding("four", replaced={"emb.weight": np.zeros((5, 3), np.float32)})
    base = [matrix("emb.weight", 5, layout=Layout.MATRIX)]
    assert misfits([one, two], base) == ["emb.weight: one replaces rows of emb.weight too, row 1 among them"]
    assert misfits([one, three], base) == [
        "emb.weight: one replaces rows of emb.weight, three adds to it; only one can hold"
    ]
    assert misfits([one, four], base) == [
        "emb.weight: four replaces emb.weight as a whole, one adds to it; only one can hold"
    ]


def test_a_dry_run_tells_of_dora():
    scaled = LoraPair(a=np.array(A), b=np.array(B), scale=0.5, magnitude=np.array([1, 2]))
    assert str(plan.make([adapter(fc=scaled)], [matrix("fc.weight")])).splitlines()[1] == (
        "  fc.weight  [2 x 3 float32]  0.5 * B A (rank 1, mine), each output to DoRA's length"
    )


# --- Prefixes ---


def test_a_prefix_that_only_the_adapter_has_is_resolved_and_told():
    made = plan.make([adapter(bert__fc=pair())], [matrix("fc.weight")])
    assert changes(made) == {"fc.weight": BA}
    assert made.notes == ("mine: the adapter's names carry the prefix `bert.` that the base's lack; resolved.",)
    assert made.output_name("fc.weight") == "fc.weight"


def test_a_prefix_of_several_parts_is_resolved():
    made = plan.make([adapter(model__text__fc=pair())], [matrix("fc.weight")])
    assert "`model.text.`" in made.notes[0]


@pytest.mark.parametrize("ending", ["weight", "in_proj_weight"])
def test_a_prefix_that_only_the_base_has_is_resolved_and_told(ending):
    made = plan.make([adapter(fc=pair())], [matrix(f"model.fc.{ending}")])
    assert changes(made) == {f"model.fc.{ending}": BA}
    assert made.notes == ("mine: the base's names carry the prefix `model.` that the adapter's lack; resolved.",)


def test_each_adapter_has_its_own_prefix():
    made = plan.make([adapter("a", bert__fc=pair()), adapter("b", fc=pair())], [matrix("fc.weight")])
    assert changes(made) == {"fc.weight": (2 * np.array(BA)).tolist()}


def test_a_prefix_must_make_every_pair_land():
    lines = misfits([adapter(bert__fc=pair(), bert__gone=pair())], [matrix("fc.weight"), matrix("fd.weight")])
    assert lines == ["bert.gone: the base has no weight for gone"]


def test_what_lies_outside_the_prefix_that_most_pairs_have_is_a_misfit_under_its_own_name():
    there = holding(
        pairs={"bert.fc": pair(), "bert.fd": pair(), "gpt.zzzzz": pair()}, biases={"gpt.zzzzz": np.ones(2, np.float32)}
    )
    lines = misfits([there], [matrix("fc.weight"), matrix("fd.weight"), vector("zzzzz.bias")])
    assert lines == [
        "gpt.zzzzz: the base has no weight for gpt.zzzzz; the nearest is zzzzz.bias",
        "gpt.zzzzz.bias: the base has no gpt.zzzzz.bias to shift",
    ]


def test_where_nothing_lands_names_are_told_as_they_are():
    assert misfits([adapter(x__y__z=pair())], [matrix("fc.weight")]) == ["x.y.z: the base has no weight for x.y.z"]


def test_two_prefixes_that_both_fit_are_refused():
    with pytest.raises(InputRefused, match=r"mine fits the base in 2 ways, by prefix: `a\.`, `a\.b\.`"):
        plan.make([adapter(a__b__fc=pair())], [matrix("fc.weight"), matrix("b.fc.weight")])
    base = [matrix("text.fc.weight"), matrix("vision.fc.weight")]
    with pytest.raises(InputRefused, match=r"mine fits the base in 2 ways, by prefix: `text\.`, `vision\.`"):
        plan.make([adapter(fc=pair())], base)


def test_one_prefix_that_is_seen_twice_is_no_ambiguity():
    base = [matrix("m.fc.weight"), matrix("m.fc.in_proj_weight")]
    assert changes(plan.make([adapter(fc=pair())], base)) == {"m.fc.weight": BA}


def test_names_that_fit_as_they_are_get_no_prefix():
    base = [matrix("fc.weight"), matrix("copy.fc.weight")]
    made = plan.make([adapter(fc=pair())], base)
    assert changes(made) == {"fc.weight": BA} and not made.notes


def test_an_added_head_gives_the_bases_tensors_the_adapters_prefix():
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


def test_a_whole_tensor_under_the_prefix_replaces_the_bases_and_nothing_is_renamed():
    pooler = holding(pairs={"bert.fc": pair()}, replaced={"bert.pooler.weight": np.ones((2, 3), np.float32)})
    made = plan.make([pooler], [matrix("fc.weight"), matrix("pooler.weight")], may_add=True)
    assert [step.weight for step in made.steps] == ["fc.weight", "pooler.weight"]
    assert made.name_prefix == ""


def test_whole_tensors_alone_show_their_prefix_too():
    made = plan.make([holding(replaced={"bert.pooler.weight": np.ones((2, 3))})], [matrix("pooler.weight")])
    assert [step.weight for step in made.steps] == ["pooler.weight"]
    assert made.notes == ("mine: the adapter's names carry the prefix `bert.` that the base's lack; resolved.",)


def test_a_head_without_a_prefix_is_added_beside_the_bases_names():
    made = plan.make(
        [holding(pairs={"fc": pair()}, replaced={"score.weight": np.ones((2, 3))})], [matrix("fc.weight")], may_add=True
    )
    assert made.output_name("fc.weight") == "fc.weight"


def test_heads_that_want_different_prefixes_are_refused():
    heads = [
        holding("a", pairs={"bert.fc": pair()}, replaced={"one.weight": np.ones((2, 2))}),
        holding("b", pairs={"roberta.fc": pair()}, replaced={"two.weight": np.ones((2, 2))}),
    ]
    with pytest.raises(InputRefused, match=r"tensors that the base lacks.*`bert\.` \(a\), `roberta\.` \(b\)"):
        plan.make(heads, [matrix("fc.weight")], may_add=True)


def test_only_a_checkpoint_can_take_an_added_tensor():
    lines = misfits([holding(replaced={"heat.weight": np.ones((2, 3))})], [matrix("head.weight")])
    assert lines == ["heat.weight: there is no heat.weight to replace; the nearest is head.weight"]


# --- Misfits ---


@pytest.mark.fault(6, 15, 20)
def test_every_misfit_is_listed_at_once_as_spelled_in_the_file_and_with_the_nearest_name():
    first = holding(
        "first",
        pairs={"good": pair(), "layer.attn.q": pair(), "narrow": pair(), "norm": pair(), "int8": pair()},
        biases={"good": np.ones(3, np.float32), "narrow": np.ones(2, np.float32)},
        replaced={"head.weight": np.ones((4, 4))},
        spelling={"layer.attn.q": "base_model.model.layer.attn.q.lora_A.weight", "good.bias": "good.lora_B.bias"},
    )
    second = adapter("second", xyz=pair())
    base = [
        matrix("good.weight"),
        vector("good.bias"),
        matrix("layer.attention.q.weight"),
        matrix("narrow.weight", 2, 5),
        TensorSpec("norm.weight", (2, 3), "float32", Layout.OTHER),
        matrix("int8.weight", dtype="int8"),
        matrix("head.weight", 4, 5),
    ]
    with pytest.raises(MatchError) as refused:
        plan.make([first, second], base, may_add=True)
    assert str(refused.value).splitlines() == [
        "8 of 9 targets do not fit the base. Nothing was written.",
        "  in first:",
        "    base_model.model.layer.attn.q.lora_A.weight: the base has no weight for layer.attn.q; "
        "the nearest is layer.attention.q.weight",
        "    narrow: narrow.weight is (2, 5) (out, in), the adapter wants (2, 3)",
        "    norm: norm.weight (2, 3) is not the weight of a linear layer, a convolution or an embedding",
        "    int8: int8.weight is int8: a quantised weight is never merged silently. Use the original float base, "
        "or dequantise it first",
        "    good.lora_B.bias: the base's good.bias has shape (2,), the adapter adds (3,)",
        "    narrow.bias: the base has no narrow.bias to shift",
        "    head.weight: head.weight is (4, 5), the adapter replaces it with (4, 4)",
        "  in second:",
        "    xyz: the base has no weight for xyz",
    ]
    assert refused.value.exit_code == 3


def test_the_nearest_name_has_the_same_numbers_where_it_can():
    base = [matrix(f"h.{layer}.attn.query.weight") for layer in range(3)]
    lines = misfits([adapter(h__2__attn__query_=pair(), h__7__attn__querie=pair())], base)
    assert [line.rpartition(" ")[2] for line in lines] == ["h.2.attn.query.weight", "h.0.attn.query.weight"]


def test_a_matrix_whose_layout_nobody_knows_is_refused():
    (line,) = misfits([adapter(c_proj=pair())], [matrix("c_proj.weight", layout=Layout.UNKNOWN)])
    assert "may be stored (out, in) or (in, out): give the model's folder" in line


def test_two_whole_tensors_cannot_share_one_place():
    wholes = [np.full((2, 3), number, np.float32) for number in (1, 2, 1)]
    holders = [holding(name, replaced={"head.weight": whole}) for name, whole in zip("abc", wholes, strict=True)]
    lines = misfits(holders, [matrix("head.weight")])
    assert lines == ["head.weight: a replaces head.weight too; two whole tensors cannot share one place"]
    (step,) = plan.make([holders[0], holders[2]], [matrix("head.weight")]).steps  # equal, they are one
    assert step.replace is wholes[0]


@pytest.mark.parametrize("changed", ["fc.weight", "fc.bias"])
def test_a_tensor_is_replaced_or_changed_but_not_both(changed):
    shift = {"fc": np.ones(2, np.float32)}
    one = holding("one", pairs={"fc": pair()}, biases=shift)
    two = holding("two", replaced={changed: np.ones((2, 3) if changed == "fc.weight" else 2)})
    lines = misfits([one, two], [matrix("fc.weight"), vector("fc.bias")])
    assert lines == [f"{changed}: two replaces {changed} as a whole, one adds to it; only one can hold"]


# --- Lost targets ---


def tower(*names: str) -> list[TensorSpec]:
    return [matrix(f"{name}.weight") for name in names]


@pytest.mark.fault(17)
def test_a_layer_that_the_config_targets_but_the_file_forgets_is_a_misfit():
    base = tower("layer.0.query", "layer.1.query", "layer.2.query", "layer.0.key")
    there = holding(pairs={"layer.0.query": pair(), "layer.2.query": pair()}, targets=("query",))
    with pytest.raises(MatchError, match="1 of 3 targets do not fit") as refused:
        plan.make([there], base)
    assert [str(misfit) for misfit in refused.value.misfits] == [
        "layer.1.query: targeted by the adapter's config, but its file has no tensors for it"
    ]


@pytest.mark.fault(17)
def test_a_target_that_the_file_forgets_altogether_is_a_misfit():
    there = holding(pairs={"layer.0.query": pair()}, targets=("query", "value"))
    assert misfits([there], tower("layer.0.query", "layer.0.value"))[0].startswith("layer.0.value: targeted")


def test_lost_targets_are_seen_through_a_prefix():
    there = holding(pairs={"bert.layer.0.query": pair()}, targets=("query",))
    assert misfits([there], tower("layer.0.query", "layer.1.query"))[0].startswith("layer.1.query: targeted")


def test_a_replaced_module_is_not_lost_under_its_prefix_either():
    there = holding(
        pairs={"bert.layer.0.fc": pair()}, replaced={"bert.layer.1.fc.weight": np.ones((2, 3))}, targets=("fc",)
    )
    assert len(plan.make([there], tower("layer.0.fc", "layer.1.fc")).steps) == 2


def test_another_tower_with_the_same_endings_is_not_lost():
    base = tower("text.layer.0.query", "vision.layer.0.query", "layer.0.subquery")
    there = holding(pairs={"text.layer.0.query": pair()}, targets=("query",))
    assert len(plan.make([there], base).steps) == 1


def test_biases_norms_and_replaced_modules_are_no_lost_targets():
    base = [*tower("layer.0.fc"), vector("layer.1.fc.weight"), matrix("layer.2.fc.weight")]
    there = holding(
        pairs={"layer.0.fc": pair()}, replaced={"layer.2.fc.weight": np.ones((2, 3), np.float32)}, targets=("fc",)
    )
    assert len(plan.make([there], base).steps) == 2


# --- Adapters that are refused before anything is matched ---


def test_no_adapter_is_refused():
    with pytest.raises(InputRefused, match="there is no adapter to apply"):
        plan.make([], [matrix("fc.weight")])


@pytest.mark.fault(11)
def test_an_adapter_that_would_change_nothing_is_refused_unless_training_starts_from_it():
    fresh = adapter("fresh", fc=pair(b=[[0], [0]]))
    with pytest.raises(InputRefused, match=r"the adapter fresh has no effect: every B \(or A, or scale\) is zero"):
        plan.make([fresh], [matrix("fc.weight")])
    assert len(plan.make([fresh], [matrix("fc.weight")], identity_ok=True).steps) == 1


@pytest.mark.fault(11)
def test_a_strength_of_zero_is_refused():
    with pytest.raises(InputRefused, match="the adapter mine has no effect: its weight is 0"):
        plan.make([adapter(fc=pair())], [matrix("fc.weight")], strengths=[0])


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_not_finite_is_refused(strength):
    with pytest.raises(InputRefused, match=f"the weight of mine is {strength}"):
        plan.make([adapter(fc=pair())], [matrix("fc.weight")], strengths=[strength])


def test_there_must_be_one_strength_for_each_adapter():
    with pytest.raises(InputRefused, match="1 adapters but 2 weights; give one --weight per adapter"):
        plan.make([adapter(fc=pair())], [matrix("fc.weight")], strengths=[1, 2])


@pytest.mark.fault(21)
def test_the_same_adapter_twice_is_refused_by_its_hash_and_by_its_name():
    one = holding("one", pairs={"fc": pair()}, sha256="0123456789abcdef")
    two = holding("two", pairs={"fc": pair()}, sha256="0123456789abcdef")
    with pytest.raises(InputRefused, match=r"two is the same adapter as one \(sha256 0123456789ab\)"):
        plan.make([one, two], [matrix("fc.weight")])
    with pytest.raises(InputRefused, match="2 adapters are called mine; give them different names"):
        plan.make([adapter(fc=pair()), adapter(fc=pair())], [matrix("fc.weight")])


# --- Printing ---


def test_a_plan_prints_no_counts_of_nothing():
    made = plan.make([adapter(fc=pair())], [matrix("fc.weight")])
    assert str(made).splitlines()[0] == "1 weights changed"


def test_a_plan_prints_what_is_done_to_which_tensor():
    mine = holding(
        "mine",
        pairs={"fc": pair(scale=2)},
        biases={"fc": np.ones(2, np.float32)},
        replaced={"head.weight": np.ones((2, 3), np.float32), "new.weight": np.ones((1, 3), np.float16)},
    )
    base = [matrix("fc.weight", dtype="bfloat16"), vector("fc.bias"), matrix("head.weight"), vector("norm.weight")]
    made = plan.make([mine, adapter("other", fc=pair())], base, strengths=[0.5, 3], may_add=True)
    assert str(made).splitlines() == [
        "1 weights changed, 1 biases changed, 1 tensors replaced, 1 tensors added, 1 kept as they are",
        "note: the base has no new.weight: it is added.",
        "  fc.weight  [2 x 3 bfloat16]  1 * B A (rank 1, mine) + 3 * B A (rank 1, other)",
        "  fc.bias  [2 float32]  bias shifted",
        "  head.weight  [2 x 3 float32]  replaced",
        "  new.weight  [1 x 3 float16]  added",
    ]


@pytest.mark.parametrize("layout", [Layout.OUT_IN, Layout.IN_OUT])
def test_row_energies_are_those_of_the_rows_as_they_are_stored(layout, monkeypatch):
    monkeypatch.setattr(plan, "ROWS_AT_ONCE", 3)
    rng = np.random.default_rng(0)
    pairs = [LoraPair(a=rng.standard_normal((r, 5)), b=rng.standard_normal((4, r)), scale=0.5) for r in (2, 3)]
    terms = tuple(Term("a", "fc", pair, strength) for pair, strength in zip(pairs, (1.0, -3.0), strict=True))
    step = Step(TensorSpec("fc.weight", (4, 5) if layout is Layout.OUT_IN else (5, 4), "float32", layout), terms)
    stored = step.stored_delta(EVERY_ROW)
    assert stored.shape == step.spec.shape
    np.testing.assert_allclose(step.row_energies(), (stored.astype(np.float64) ** 2).sum(axis=1), rtol=1e-5)
    shifted = Step(step.spec, shift=np.array([1, -2], np.float32))
    assert shifted.row_energies().tolist() == [1, 4]


# --- Bases and adapters of many names ---


@pytest.mark.fault(15)
def test_an_adapter_for_another_mixture_of_experts_is_told_quickly():
    def names(kinds: str) -> list[str]:
        return [f"layers.{i}.experts.{j}.{kind}_proj" for i in range(30) for j in range(100) for kind in kinds]

    begun = time.process_time()
    lines = misfits([holding(pairs={name: pair() for name in names("ab")})], tower(*names("cd")))
    assert len(lines) == 6000
    assert lines[-1].endswith("the nearest is layers.29.experts.99.d_proj.weight")
    assert time.process_time() - begun < 5


@pytest.mark.fault(15)
def test_names_that_are_all_strange_are_told_quickly():
    letters = random.Random(0)
    strange, base = (["".join(letters.choices("abcdefgh.", k=60)) for _ in range(500)] for _ in range(2))
    begun = time.process_time()
    assert len(misfits([holding(pairs={name: pair() for name in strange})], tower(*base))) == 500
    assert time.process_time() - begun < 10


@pytest.mark.fault(17)
def test_many_forgotten_targets_are_told_quickly():
    base = tower(*(f"{i}.a" for i in range(5000)), *(f"x{i}" for i in range(5000)))
    there = holding(pairs={"0.a": pair()}, targets=("a", *(f"x{i}" for i in range(5000))))
    begun = time.process_time()
    assert len(misfits([there], base)) == 9999
    assert time.process_time() - begun < 5
