"""The plan: which adapter tensor changes which base tensor, in one step for each."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lora_export import plan, sums
from lora_export.errors import InputRefused, MatchError, WrongUsage
from lora_export.lora import Adapter, ModuleEndings, TokenRows
from lora_export.plan import Layout
from support.plans import BA, adapter, changes, holding, matrix, misfits, pair, rows, table, tied, vector


def test_rows_of_a_tied_table_are_replaced_for_both():
    rows = TokenRows(np.array([1]), np.ones((1, 3), np.float32))
    (step,) = plan.make([holding(token_rows={"emb.weight": rows})], [tied()]).steps
    assert step.replaces_only_rows


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


@pytest.mark.parametrize(
    ("saved", "lacking"),
    [
        (("classifier", "score"), "pre_classifier"),  # as PEFT compares them: by any ending
        (("fc", "score", "class"), ""),
        (("head",), "head, a.head, b.head and 1 more"),
        ((), ""),
    ],
)
def test_whole_modules_that_the_file_lacks_are_noted(saved, lacking):
    names = "fc.weight", "classifier.weight", "classifier.bias", "pre_classifier.weight"
    names += "head.weight", "head.bias", "a.head.weight", "b.head.weight", "c.head.weight"
    whole = {"classifier.weight": np.ones((2, 3), np.float32)}
    mine = dataclasses.replace(holding(pairs={"fc": pair()}, replaced=whole), saved_whole=ModuleEndings(saved))
    made = plan.make([mine], [vector(name) if name.endswith("bias") else matrix(name) for name in names])
    note = f"modules_to_save of mine names {lacking}, and its file has nothing of that: the base's own stay."
    assert made.notes == ((note,) if lacking else ())


@pytest.mark.parametrize(
    ("bias", "saved", "lacking"),
    [
        ("lora_only", (), "fc.bias, out.bias"),
        ("all", ("fc.bias",), "out.bias"),
        ("all", ("fc.bias", "out.bias"), ""),
        ("none", (), ""),
    ],
)
def test_trained_biases_that_the_file_lacks_are_noted(bias, saved, lacking):
    base = [matrix("fc.weight"), vector("fc.bias"), matrix("out.weight"), vector("out.bias"), vector("norm.bias")]
    whole = {name: np.ones(2, np.float32) for name in saved}
    mine = dataclasses.replace(holding(pairs={"fc": pair(), "out": pair()}, replaced=whole), metadata={"bias": bias})
    (note,) = plan.make([mine], base).notes or ("",)
    expected = (
        f"the config of mine states bias={bias}, and its file lacks {lacking}: the base's own stay." if lacking else ""
    )
    assert note.startswith(expected) and bool(note) == bool(lacking)


def test_a_pair_is_added_to_the_whole_tensor_of_its_adapter():
    whole = np.zeros((3, 2), np.float32)
    base = [matrix("emb.weight", 3, 2, layout=Layout.MATRIX)]
    made = plan.make([holding(pairs={"emb": table()}, replaced={"emb.weight": whole})], base)
    (step,) = made.steps
    assert step.replace is whole and step.terms and not step.is_replacement
    assert str(made).splitlines() == [
        "1 weight changed",
        "  emb.weight  [3 x 2 float32]  1 * B A (rank 1, mine), on an embedding, added to the whole tensor from "
        "the adapter",
    ]
    both = [holding(name, pairs={"emb": table()}, replaced={"emb.weight": whole.copy()}) for name in ("one", "two")]
    (step,) = plan.make(both, base).steps
    assert (
        step.replace is not None and not step.replace.any() and [term.adapter for term in step.terms] == ["one", "two"]
    )
    apart = [holding(replaced={"emb.weight": whole}), adapter("other", emb=table())]
    assert misfits(apart, base) == [
        "emb.weight: mine replaces the whole emb.weight, and other adds to it. Merge only one of these adapters"
    ]


def test_different_rows_of_several_adapters_are_one_step():
    one, two = (holding(name, token_rows={"emb.weight": own}) for name, own in (("one", rows(4, 1)), ("two", rows(2))))
    made = plan.make([one, two], [matrix("emb.weight", 5, layout=Layout.MATRIX)])
    (step,) = made.steps
    assert (step.token_rows.indices.tolist(), step.token_rows.values[:, 0].tolist()) == ([4, 1, 2], [5, 2, 3])
    assert step.is_replacement and step.replaces_only_rows
    assert str(made).splitlines() == [
        "1 table with some rows replaced",
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
    assert str(made).splitlines()[1] == "  emb.weight  [5 x 3 float32]  replaced, then 1 row replaced"


def test_the_base_that_an_adapter_names_is_told():
    made = Adapter("fr", "test", {"xyz": pair()}, metadata={"base_model_name_or_path": "owner/model"})
    with pytest.raises(MatchError, match=r"it was trained for owner/model \(base_model_name_or_path in its config\)"):
        plan.make([made], [matrix("good.weight")])


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
    with pytest.raises(WrongUsage, match="1 adapter but 2 weights; give one weights= per adapter"):
        plan.make([adapter(fc=pair())], [matrix("fc.weight")], strengths=[1, 2])


@pytest.mark.fault(21)
def test_the_same_adapter_twice_is_refused_by_hash_and_by_name():
    one = holding("one", pairs={"fc": pair()}, sha256="0123456789abcdef")
    two = holding("two", pairs={"fc": pair()}, sha256="0123456789abcdef")
    with pytest.raises(InputRefused, match=r"two is the same adapter as one \(sha256 0123456789ab\)\. Give each"):
        plan.make([one, two], [matrix("fc.weight")])
    with pytest.raises(InputRefused, match="2 adapters are called mine; give them different names"):
        plan.make([adapter(fc=pair()), adapter(fc=pair())], [matrix("fc.weight")])
