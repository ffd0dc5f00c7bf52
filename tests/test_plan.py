"""The plan: which adapter tensor changes which base tensor. Bases are lists of names and shapes."""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np
import pytest

from lora_export import plan, sums
from lora_export.errors import InputRefused, MatchError, WrongUsage
from lora_export.lora import Adapter, LoraPair, TokenRows
from lora_export.plan import Layout, Plan, TensorSpec

A = [[1, 2, 3]]  # (rank 1, in 3)
B = [[1], [10]]  # (out 2, rank 1)
BA = [[1, 2, 3], [10, 20, 30]]


def pair(a: Any = A, b: Any = B, scale: float = 1.0) -> LoraPair:
    return LoraPair(a=np.array(a), b=np.array(b), scale=scale)


def adapter(name: str = "mine", **pairs: LoraPair) -> Adapter:
    """An adapter of these modules; a double underscore means a dot."""
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
    return {step.weight: sums.delta(step).tolist() for step in made.steps}


def unknown(name: str, rows: int = 2, columns: int = 2) -> TensorSpec:
    return matrix(name, rows, columns, layout=Layout.UNKNOWN)


def square() -> LoraPair:
    return pair([[1, 2]], [[1], [10]])


def recording(layout: str, name: str = "mine", **pairs: LoraPair) -> Adapter:
    return holding(name, pairs=pairs, layouts=dict.fromkeys(pairs, layout))


def settled(made: Plan) -> dict[str, tuple[str, str]]:
    return {step.weight: (step.spec.layout, step.spec.layout_source) for step in made.steps}


# --- Layouts that the base does not state ---


@pytest.mark.parametrize(("shape", "layout"), [((2, 3), "out_in"), ((3, 2), "in_out")])
def test_a_shape_that_fits_one_layout_decides_it(shape, layout):
    made = plan.make([adapter(fc=pair())], [unknown("fc.weight", *shape)])
    assert settled(made) == {"fc.weight": (layout, "shape")}
    assert made.steps[0].spec.matrix == (2, 3)
    assert f"{shape[0]} x {shape[1]} float32, {layout} by shape" in str(made)


def test_a_square_matrix_of_unknown_layout_is_refused_by_name():
    base = [unknown(f"h.{layer}.fc.weight") for layer in range(5)]
    one = holding(pairs={f"h.{layer}.fc": square() for layer in range(5)})
    with pytest.raises(InputRefused) as refused:
        plan.make([one], base)
    assert str(refused.value).startswith(
        "the layout of 5 square matrices is unknown: h.0.fc.weight, h.1.fc.weight, h.2.fc.weight, and 2 more. Neither"
    )
    assert "--layout NAME=out_in or --layout NAME=in_out" in str(refused.value)
    assert {layout for layout, _ in settled(plan.make([one], base, unknown_layout_ok=True)).values()} == {"unknown"}


@pytest.mark.parametrize("pattern", ["a.fc.weight", "a.fc", "a.*", "*"])
def test_the_option_decides_by_tensor_module_or_glob(pattern):
    base = [unknown("a.fc.weight")]
    made = plan.make([holding(pairs={"a.fc": square()})], base, layout={pattern: "in_out"})
    assert settled(made) == {"a.fc.weight": ("in_out", "option")}
    assert "in_out by option" in str(made)


def test_the_last_statement_that_matches_counts():
    one, base = adapter(a=square(), b=square()), [unknown("a.weight"), unknown("b.weight")]
    made = plan.make([one], base, layout={"*": "out_in", "b": "in_out"})
    assert settled(made) == {"a.weight": ("out_in", "option"), "b.weight": ("in_out", "option")}
    made = plan.make([one], base, layout={"b": "in_out", "*": "out_in"})
    assert {layout for layout, _ in settled(made).values()} == {"out_in"}


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_the_record_of_an_adapter_decides(layout):
    assert settled(plan.make([recording(layout, fc=square())], [unknown("fc.weight")])) == {
        "fc.weight": (layout, "adapter")
    }


def test_a_record_that_a_shape_contradicts_is_no_evidence():
    # One `fan_in_fan_out` for a Conv1D and an nn.Linear.
    one = recording("in_out", fc=square(), dense=pair())
    with pytest.raises(InputRefused, match=r"the layout of 1 square matrix is unknown: fc\.weight"):
        plan.make([one], [unknown("fc.weight"), unknown("dense.weight", 2, 3)])
    made = plan.make([one], [unknown("fc.weight"), unknown("dense.weight", 3, 2)])
    assert settled(made)["fc.weight"] == ("in_out", "adapter")


def test_two_records_that_contradict_each_other_are_no_evidence():
    two = [recording("in_out", "one", fc=square()), recording("out_in", "two", fc=square())]
    with pytest.raises(InputRefused, match=r"the layout of 1 square matrix is unknown: fc\.weight"):
        plan.make(two, [unknown("fc.weight")])


def test_the_option_overrides_the_record_of_an_adapter():
    made = plan.make([recording("in_out", fc=square())], [unknown("fc.weight")], layout={"fc": "out_in"})
    assert settled(made) == {"fc.weight": ("out_in", "option")}


@pytest.mark.parametrize(
    ("spec", "layout", "message"),
    [
        (unknown("fc.weight", 2, 3), "in_out", "in_out, but with the shape (2, 3), the adapter's is out_in"),
        (matrix("fc.weight", layout=Layout.MATRIX), "in_out", "in_out, but the base's is out_in"),
        (matrix("fc.weight", 3, 2, layout=Layout.IN_OUT), "out_in", "out_in, but the base's is in_out"),
    ],
)
def test_an_option_that_contradicts_the_base_is_refused(spec, layout, message):
    with pytest.raises(InputRefused) as refused:
        plan.make([adapter(fc=pair())], [spec], layout={"*": layout})
    assert str(refused.value) == f"--layout states that fc.weight is {message}"


def test_an_option_for_no_matrix_is_refused():
    with pytest.raises(InputRefused, match="--layout fd=out_in: no matrix of the base has this name"):
        plan.make([adapter(fc=square())], [unknown("fc.weight"), vector("fd")], layout={"fd": "out_in"})
    with pytest.raises(WrongUsage, match="a layout is out_in or in_out"):
        plan.make([adapter(fc=square())], [unknown("fc.weight")], layout={"fc": "conv"})


def test_an_embedding_of_unknown_layout_is_one_by_its_pair():
    one = adapter(emb=LoraPair(np.ones((1, 2)), np.ones((2, 1)), 1.0, embedding=True))
    for layout in ({}, {"*": "out_in"}, {"*": "in_out"}):
        assert settled(plan.make([one], [unknown("emb.weight")], layout=layout)) == {
            "emb.weight": ("embedding", "base")
        }


# --- Tensors with two names ---


def tied() -> TensorSpec:
    return matrix("emb.weight", aliases=("head.weight",))


def test_a_pair_on_a_tied_tensor_is_refused():
    assert misfits([adapter(emb=pair())], [tied()]) == [
        "emb.weight: emb.weight is head.weight too (the header of the file ties them), which the adapter does not "
        "change. Untie the base first (save each as a tensor of its own)"
    ]
    assert misfits([adapter(head=pair())], [tied()]) == [
        "head: head.weight is stored as emb.weight: the two are tied, and a change of one would change both. Untie the "
        "base first (save each as a tensor of its own)"
    ]


def test_a_whole_tensor_for_one_tied_name_unties_or_refuses():
    whole = np.ones((2, 3), np.float32)
    assert len(misfits([holding(replaced={"emb.weight": whole})], [tied()], may_add=True)) == 1
    made = plan.make([holding(replaced={"head.weight": whole})], [tied()], may_add=True)
    assert [step.weight for step in made.steps] == ["head.weight"] and made.kept == ("emb.weight",)
    assert made.notes == ("the base has no head.weight: it is added, and no longer tied to emb.weight.",)
    both = holding(replaced={"emb.weight": whole, "head.weight": whole}, pairs={"emb": pair()})
    assert len(plan.make([both], [tied()], may_add=True).steps) == 2


def test_rows_of_a_tied_table_are_replaced_for_both():
    rows = TokenRows(np.array([1]), np.ones((1, 3), np.float32))
    (step,) = plan.make([holding(token_rows={"emb.weight": rows})], [tied()]).steps
    assert step.replaces_only_rows


# --- What matches ---


def test_each_pair_changes_its_modules_weight_and_nothing_else():
    base = [matrix("fc.weight"), vector("fc.bias"), matrix("other.weight")]
    made = plan.make([adapter(fc=pair(scale=0.5))], base)
    assert changes(made) == {"fc.weight": [[0.5, 1, 1.5], [5, 10, 15]]}
    assert made.kept == ("fc.bias", "other.weight")
    assert not made.notes


def test_several_adapters_on_one_weight_are_one_step():
    first, second = (
        adapter("first", fc=pair()),
        adapter("second", fc=pair(a=[[0, 0, 1], [1, 0, 0]], b=[[1, 0], [0, 2]])),
    )
    made = plan.make([first, second], [matrix("fc.weight")], strengths=[2, -1])
    assert len(made.steps) == 1
    # 2 * BA - [[0, 0, 1], [2, 0, 0]]
    assert changes(made) == {"fc.weight": [[2, 4, 5], [18, 40, 60]]}


def test_steps_have_the_order_of_the_base():
    made = plan.make([adapter(b=pair(), a=pair())], [matrix("a.weight"), matrix("b.weight")])
    assert [step.weight for step in made.steps] == ["a.weight", "b.weight"]


def test_packed_attention_and_bare_parameters_are_found():
    made = plan.make([adapter(attn=pair(), experts=pair())], [matrix("attn.in_proj_weight"), matrix("experts")])
    assert [step.weight for step in made.steps] == ["attn.in_proj_weight", "experts"]


def test_a_square_in_out_weight_gets_the_transposed_change():
    # Only the layout tells: the shapes would fit both ways.
    mine = adapter(fc=pair(a=[[1, 2]], b=[[1], [10]]))
    for layout, stored in ((Layout.OUT_IN, [[1, 2], [10, 20]]), (Layout.IN_OUT, [[1, 10], [2, 20]])):
        (step,) = plan.make([mine], [matrix("fc.weight", 2, 2, layout=layout)]).steps
        assert sums.stored_delta(step, slice(None)).tolist() == stored
        assert sums.stored_delta(step, slice(1, 2)).tolist() == stored[1:]
        assert sums.delta(step).tolist() == [[1, 2], [10, 20]]  # always (out, in)


def test_an_in_out_weight_is_matched_by_its_out_in_view():
    (step,) = plan.make([adapter(fc=pair())], [matrix("fc.weight", 3, 2, layout=Layout.IN_OUT)]).steps
    assert sums.stored_delta(step, slice(None)).tolist() == np.transpose(BA).tolist()


def test_two_adapters_on_an_in_out_weight_are_summed_as_stored():
    base = [matrix("fc.weight", 3, 2, layout=Layout.IN_OUT)]
    made = plan.make([adapter("a", fc=pair()), adapter("b", fc=pair())], base, strengths=[1, 2])
    assert sums.stored_delta(made.steps[0], slice(None)).tolist() == (3 * np.transpose(BA)).tolist()


def test_bias_shifts_of_adapters_are_summed_at_their_strengths():
    shift = np.array([1, 2], np.float32)
    one = holding("one", pairs={"fc": pair()}, biases={"fc": shift})
    two = holding("two", pairs={"fc": pair()}, biases={"fc": shift})
    made = plan.make([one, two], [matrix("fc.weight"), vector("fc.bias")], strengths=[1, 10])
    step = made.by_weight["fc.bias"]
    assert sums.delta(step).tolist() == [11, 22]
    assert sums.stored_delta(step, slice(1, 2)).tolist() == [22]


def test_a_whole_tensor_replaces_that_of_the_base():
    head, spec = np.ones((2, 3), np.float16), matrix("head.weight", file="model.safetensors")
    made = plan.make([holding(replaced={"head.weight": head})], [spec, vector("head.bias")])
    (step,) = made.steps
    assert step.replace is head and step.spec is spec and not step.added
    assert made.kept == ("head.bias",)


# --- Embeddings, convolutions, DoRA ---


def table(a: Any = A, b: Any = B, **fields: Any) -> LoraPair:
    return LoraPair(a=np.array(a), b=np.array(b), scale=1.0, embedding=True, **fields)


@pytest.mark.parametrize("layout", [Layout.EMBEDDING, Layout.MATRIX])
def test_an_embedding_pair_changes_rows_of_words(layout):
    (step,) = plan.make([adapter(emb=table())], [matrix("emb.weight", 3, 2, layout=layout)]).steps  # 3 words, 2 wide
    assert step.spec.layout is Layout.EMBEDDING
    assert sums.delta(step).tolist() == BA
    assert sums.stored_delta(step, slice(1, 3)).tolist() == np.transpose(BA)[1:].tolist()


def test_a_step_has_the_layout_that_the_pair_determines():
    (step,) = plan.make([adapter(fc=pair())], [matrix("fc.weight", layout=Layout.MATRIX)]).steps
    assert (step.spec.layout, sums.stored_delta(step, slice(None)).tolist()) == (Layout.OUT_IN, BA)


def test_pairs_of_embeddings_and_linear_layers_are_not_confused():
    # All are square: no shape would tell.
    square = {"a": [[1, 2]], "b": [[1], [10]]}
    mine = adapter(emb=table(**square), fc=pair(**square), other=table(**square))
    base = [
        matrix("emb.weight", 2, 2),
        matrix("fc.weight", 2, 2, layout=Layout.EMBEDDING),
        matrix("other.weight", 2, 2, layout=Layout.IN_OUT),
    ]
    assert misfits([mine], base) == [
        "emb: emb.weight is the weight of a linear layer, the adapter was trained on an embedding",
        "fc: fc.weight is the weight of an embedding, the adapter was trained on a linear layer",
        "other: other.weight is the weight of a linear layer, the adapter was trained on an embedding",
    ]
    two = [adapter("one", fc=pair(**square)), adapter("two", fc=table(**square))]
    assert misfits(two, [matrix("fc.weight", 2, 2, layout=Layout.MATRIX)]) == [
        "fc.weight: two was trained with fc.weight as an embedding, one as a linear layer"
    ]


def test_a_misfit_of_a_table_lists_width_and_rows():
    assert misfits([adapter(emb=table())], [matrix("emb.weight", 4, 2, layout=Layout.MATRIX)]) == [
        "emb: emb.weight is (2, 4) (width, rows), the adapter was trained on (2, 3)"
    ]


def test_dora_and_another_adapter_on_one_weight_conflict():
    scaled = LoraPair(a=np.array(A), b=np.array(B), scale=1.0, magnitude=np.array([1, 2]))
    for order in ([pair(), scaled], [scaled, pair()], [scaled, scaled]):
        adapters = [adapter(name, fc=pair, other=pair) for name, pair in zip(("one", "two"), order, strict=True)]
        lines = misfits(adapters, [matrix("fc.weight"), matrix("other.weight")])
        assert lines == [
            f"{name}: one and two both change {name}, and DoRA rescales the whole sum, so the result depends on their "
            "order. To choose an order, merge one adapter, then the other into the result"
            for name in ("fc.weight", "other.weight")
        ]


def test_dora_and_another_adapter_on_different_weights_are_one_plan():
    scaled = LoraPair(a=np.array(A), b=np.array(B), scale=1.0, magnitude=np.array([1, 2]))
    made = plan.make([adapter("one", a=scaled), adapter("two", b=pair())], [matrix("a.weight"), matrix("b.weight")])
    assert [step.magnitude is None for step in made.steps] == [False, True]


def test_a_pair_is_added_to_the_whole_tensor_of_its_adapter():
    whole = np.zeros((3, 2), np.float32)
    base = [matrix("emb.weight", 3, 2, layout=Layout.MATRIX)]
    made = plan.make([holding(pairs={"emb": table()}, replaced={"emb.weight": whole})], base)
    (step,) = made.steps
    assert step.replace is whole and step.terms and not step.is_replacement
    assert str(made).splitlines() == [
        "1 weights changed",
        "  emb.weight  [3 x 2 float32]  1 * B A (rank 1, mine), on an embedding, added to the whole tensor from "
        "the adapter",
    ]
    apart = [holding(replaced={"emb.weight": whole}), adapter("other", emb=table())]
    assert misfits(apart, base) == [
        "emb.weight: mine replaces the whole emb.weight, and other adds to it. Merge only one of these adapters"
    ]


def rows(*indices: int, width: int = 3) -> TokenRows:
    return TokenRows(np.array(indices), np.ones((len(indices), width), np.float32) * (1 + np.array(indices)[:, None]))


def test_different_rows_of_several_adapters_are_one_step():
    one, two = (holding(name, token_rows={"emb.weight": own}) for name, own in (("one", rows(4, 1)), ("two", rows(2))))
    made = plan.make([one, two], [matrix("emb.weight", 5, layout=Layout.MATRIX)])
    (step,) = made.steps
    assert (step.token_rows.indices.tolist(), step.token_rows.values[:, 0].tolist()) == ([4, 1, 2], [5, 2, 3])
    assert step.is_replacement and step.replaces_only_rows
    assert str(made).splitlines() == [
        "1 tables with some rows replaced",
        "  emb.weight  [5 x 3 float32]  3 rows replaced",
    ]
    table = np.array(np.zeros((2, 3)))  # the rows 1 and 2 of five
    step.token_rows.write_into(table, 1)
    assert table.tolist() == [[2, 2, 2], [3, 3, 3]]


def test_rows_replace_those_of_the_whole_tensor_with_them():
    whole = np.zeros((5, 3), np.float32)
    made = plan.make(
        [holding(token_rows={"emb.weight": rows(1)}, replaced={"emb.weight": whole})], [matrix("emb.weight", 5)]
    )
    assert made.steps[0].replace is whole and not made.steps[0].replaces_only_rows
    assert str(made).splitlines()[1] == "  emb.weight  [5 x 3 float32]  replaced, then 1 rows replaced"


def test_rows_that_do_not_fit_are_misfits():
    base = [matrix("emb.weight", 5), matrix("wide.weight", 5, 4), matrix("small.weight", dtype="int8"), vector("bias")]
    names = ("emb.weight", "wide.weight", "small.weight", "bias", "other.weight")
    assert misfits([holding(token_rows=dict.fromkeys(names, rows(5)))], base) == [
        "emb.weight: emb.weight has 5 rows, the adapter replaces row 5",
        "wide.weight: wide.weight is (5, 4) float32, the adapter replaces rows of 3 floats",
        "small.weight: small.weight is (2, 3) int8, the adapter replaces rows of 3 floats",
        "bias: bias is (2,) float32, the adapter replaces rows of 3 floats",
        "other.weight: the base has no other.weight, of which the adapter replaces rows",
    ]


def test_rows_conflict_with_other_changes_of_their_table():
    one, two = (
        holding(name, token_rows={"emb.weight": own}) for name, own in (("one", rows(4, 1)), ("two", rows(1, 2)))
    )
    three = adapter("three", emb=table(a=[[1] * 5], b=[[1]] * 3))
    four = holding("four", replaced={"emb.weight": np.zeros((5, 3), np.float32)})
    base = [matrix("emb.weight", 5, layout=Layout.MATRIX)]
    assert misfits([one, two], base) == [
        "emb.weight: one also replaces rows of emb.weight, for example row 1. Merge only one of these adapters"
    ]
    assert misfits([one, three], base) == [
        "emb.weight: one replaces rows of emb.weight, and three adds to it. Merge only one of these adapters"
    ]
    assert misfits([one, four], base) == [
        "emb.weight: four replaces the whole emb.weight, and one adds to it. Merge only one of these adapters"
    ]


def test_a_printed_plan_names_dora():
    scaled = LoraPair(a=np.array(A), b=np.array(B), scale=0.5, magnitude=np.array([1, 2]))
    assert str(plan.make([adapter(fc=scaled)], [matrix("fc.weight")])).splitlines()[1] == (
        "  fc.weight  [2 x 3 float32]  0.5 * B A (rank 1, mine), each output rescaled to DoRA's magnitude"
    )


# --- Prefixes ---


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


def test_a_new_tensor_is_a_misfit_without_may_add():
    lines = misfits([holding(replaced={"heat.weight": np.ones((2, 3))})], [matrix("head.weight")])
    assert lines == [
        "heat.weight: the base has no heat.weight, which the adapter replaces; the nearest name is head.weight"
    ]


# --- Misfits ---


@pytest.mark.fault(6, 15, 20)
def test_every_misfit_is_listed_with_its_key_and_the_nearest_name():
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
    assert str(refused.value).startswith("8 of 9 targets do not fit the base. Nothing was written.")
    assert [misfit.adapter for misfit in refused.value.misfits] == ["first"] * 7 + ["second"]
    assert list(map(str, refused.value.misfits)) == [
        "base_model.model.layer.attn.q.lora_A.weight: the base has no weight for layer.attn.q; "
        "the nearest name is layer.attention.q.weight",
        "narrow: narrow.weight is (2, 5) (out, in), the adapter was trained on (2, 3)",
        "norm: norm.weight (2, 3) is not the weight of a linear layer, a convolution or an embedding",
        "int8: int8.weight is int8: a quantised weight is never merged silently. Use the original float base, "
        "or dequantise this one first",
        "good.lora_B.bias: the base's good.bias has shape (2,), the adapter adds (3,)",
        "narrow.bias: the base has no narrow.bias, which the adapter changes",
        "head.weight: head.weight is (4, 5), the adapter replaces it with (4, 4)",
        "xyz: the base has no weight for xyz",
    ]
    assert refused.value.exit_code == 3


def test_the_base_that_an_adapter_names_is_told():
    made = Adapter("fr", "test", {"xyz": pair()}, metadata={"base_model_name_or_path": "owner/model"})
    with pytest.raises(MatchError, match=r"it was trained for owner/model \(base_model_name_or_path in its config\)"):
        plan.make([made], [matrix("good.weight")])


def test_the_nearest_name_has_the_same_numbers_where_possible():
    base = [matrix(f"h.{layer}.attn.query.weight") for layer in range(3)]
    lines = misfits([adapter(h__2__attn__query_=pair(), h__7__attn__querie=pair())], base)
    assert [line.rpartition(" ")[2] for line in lines] == ["h.2.attn.query.weight", "h.0.attn.query.weight"]


def test_a_matrix_that_fits_in_neither_layout_is_a_misfit():
    assert misfits([adapter(fc=pair())], [unknown("fc.weight", 2, 5)]) == [
        "fc: fc.weight is (2, 5), the adapter was trained on (2, 3) (out, in)"
    ]


def test_two_different_whole_tensors_of_one_name_conflict():
    wholes = [np.full((2, 3), number, np.float32) for number in (1, 2, 1)]
    holders = [holding(name, replaced={"head.weight": whole}) for name, whole in zip("abc", wholes, strict=True)]
    lines = misfits(holders, [matrix("head.weight")])
    assert lines == ["head.weight: a also replaces head.weight, with other values. Merge only one of these adapters"]
    (step,) = plan.make([holders[0], holders[2]], [matrix("head.weight")]).steps  # equal, they are one
    assert step.replace is wholes[0]


@pytest.mark.parametrize("changed", ["fc.weight", "fc.bias"])
def test_a_replaced_tensor_conflicts_with_a_change(changed):
    shift = {"fc": np.ones(2, np.float32)}
    one = holding("one", pairs={"fc": pair()}, biases=shift)
    two = holding("two", replaced={changed: np.ones((2, 3) if changed == "fc.weight" else 2)})
    lines = misfits([one, two], [matrix("fc.weight"), vector("fc.bias")])
    assert lines == [
        f"{changed}: two replaces the whole {changed}, and one adds to it. Merge only one of these adapters"
    ]


# --- Missing targets ---


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


# --- Adapters that are refused before anything is matched ---


def test_no_adapter_is_refused():
    with pytest.raises(InputRefused, match="there is no adapter to apply"):
        plan.make([], [matrix("fc.weight")])


@pytest.mark.fault(11)
def test_an_identity_adapter_is_refused_unless_allowed():
    fresh = adapter("fresh", fc=pair(b=[[0], [0]]))
    with pytest.raises(
        InputRefused, match=r"adapter fresh has no effect: every B \(or A, or scale\) is zero, as before"
    ):
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


def test_the_number_of_strengths_must_be_that_of_adapters():
    with pytest.raises(InputRefused, match="1 adapters but 2 weights; give one --weight per adapter"):
        plan.make([adapter(fc=pair())], [matrix("fc.weight")], strengths=[1, 2])


@pytest.mark.fault(21)
def test_the_same_adapter_twice_is_refused_by_hash_and_by_name():
    one = holding("one", pairs={"fc": pair()}, sha256="0123456789abcdef")
    two = holding("two", pairs={"fc": pair()}, sha256="0123456789abcdef")
    with pytest.raises(InputRefused, match=r"two is the same adapter as one \(sha256 0123456789ab\)\. Give each"):
        plan.make([one, two], [matrix("fc.weight")])
    with pytest.raises(InputRefused, match="2 adapters are called mine; give them different names"):
        plan.make([adapter(fc=pair()), adapter(fc=pair())], [matrix("fc.weight")])


# --- Printing ---


def test_a_printed_plan_omits_counts_of_zero():
    made = plan.make([adapter(fc=pair())], [matrix("fc.weight")])
    assert str(made).splitlines()[0] == "1 weights changed"


def test_a_printed_plan_lists_every_changed_tensor():
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


# --- Bases and adapters of many names ---


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
