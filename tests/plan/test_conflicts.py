"""Adapters that contradict each other on one tensor."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from lora_export import plan
from lora_export.formats.peft_kinds import entry_wise
from lora_export.lora import LoraPair
from lora_export.pairs.transforms import WeightTransform
from lora_export.plan import Layout, Ties
from support.plans import A, B, adapter, holding, matrix, misfits, pair, rows, table, tied, vector


def test_a_pair_on_a_tied_tensor_is_refused():
    assert misfits([adapter(emb=pair())], [tied()]) == [
        "emb.weight: emb.weight is head.weight too (the header of the file ties them), which the adapter does not "
        'change. tied="untie" gives each a tensor of its own, as the adapter was trained; tied="both" changes both'
    ]
    assert misfits([adapter(head=pair())], [tied()]) == [
        "head: head.weight is stored as emb.weight: the two are tied, and a change of one would change both. "
        'tied="untie" gives each a tensor of its own, as the adapter was trained; tied="both" changes both'
    ]


@pytest.mark.parametrize("changed", ["emb", "head"])
def test_a_way_that_the_config_does_not_have_is_not_named(changed):
    """T5 cannot be untied."""
    (refused,) = misfits([adapter(**{changed: pair()})], [tied()], ties=Ties(bound="T5 stays tied"))
    assert refused.endswith('. tied="both" changes both')


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
    both = dataclasses.replace(three, token_rows=one.token_rows)
    assert misfits([both], base) == [
        "emb.weight: three replaces rows of emb.weight, and adds to it: no merge does both"
    ]
    assert misfits([one, four], base) == [
        "emb.weight: four replaces the whole emb.weight, and one replaces rows of it. Merge only one of these adapters"
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


def test_a_shift_beside_a_change_that_scales_the_bias_is_refused():
    """IA3 scales the bias of its layer: what another adapter adds to that was lost."""
    scales: Any = {"ia3_l": np.array([2, 3])}, entry_wise._lower_ia3
    bias = WeightTransform("IA3", *scales, (2,), settings={"of_inputs": False})
    change = WeightTransform("IA3", *scales, (2, 0), settings={"of_inputs": False}, bias=bias)
    scaling = holding("scales", pairs={"fc": change})
    for own in {"biases": {"fc": np.ones(2, np.float32)}}, {"added": {"fc.bias": np.ones(2, np.float32)}}:
        assert misfits([scaling, holding("adds", **own)], [matrix("fc.weight"), vector("fc.bias")]) == [
            "fc.bias: scales and adds both change fc.bias, and IA3's change follows from the weight, so the result "
            "depends on their order. To choose an order, merge one adapter, then the other into the result"
        ]


def test_an_adapter_adds_to_the_bias_that_it_saves():
    """`bias` and `lora_bias` of PEFT at once."""
    ones = np.ones(2, np.float32)
    both = holding("one", pairs={"fc": pair()}, biases={"fc": ones}, replaced={"fc.bias": 2 * ones})
    step = plan.make([both], [matrix("fc.weight"), vector("fc.bias")], strengths=[3.0]).by_weight["fc.bias"]
    assert str(step) == "bias replaced, then shifted" and not step.is_replacement
    assert step.replace.tolist() == [2, 2] and step.shift.tolist() == [3, 3]
    assert (step.values_of, step.shift_of) == (("one",), ("one",))
