"""The types of a plan: views of a weight, factors of a pair, the step of one adapter, names of outputs, text."""

from __future__ import annotations

import numpy as np
import pytest

from lora_export import plan
from lora_export.lora import LoraPair
from lora_export.plan import Layout, Plan, Step, TensorSpec, Term
from support.plans import BA, A, B, adapter, holding, matrix, pair, vector


def test_a_printed_plan_names_dora():
    scaled = LoraPair(a=np.array(A), b=np.array(B), scale=0.5, magnitude=np.array([1, 2]))
    assert str(plan.make([adapter(fc=scaled)], [matrix("fc.weight")])).splitlines()[1] == (
        "  fc.weight  [2 x 3 float32]  0.5 * B A (rank 1, mine), each output rescaled to DoRA's magnitude"
    )


def test_a_printed_plan_omits_counts_of_zero():
    made = plan.make([adapter(fc=pair())], [matrix("fc.weight")])
    assert str(made).splitlines()[0] == "1 weight changed"


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
        "1 weight changed, 1 bias changed, 1 tensor replaced, 1 tensor added, 1 kept as it is",
        "note: the base has no new.weight: it is added.",
        "  fc.weight  [2 x 3 bfloat16]  1 * B A (rank 1, mine) + 3 * B A (rank 1, other)",
        "  fc.bias  [2 float32]  bias shifted",
        "  head.weight  [2 x 3 float32]  replaced",
        "  new.weight  [1 x 3 float16]  added",
    ]


@pytest.mark.parametrize(
    ("layout", "shape", "out_in"),
    [
        (Layout.OUT_IN, (2, 3), (2, 3)),
        (Layout.IN_OUT, (3, 2), (2, 3)),
        (Layout.EMBEDDING, (3, 2), (2, 3)),
        (Layout.OUT_IN, (2, 3, 5), (2, 3, 5)),
        (Layout.OTHER, (7,), (7,)),
    ],
)
def test_pairs_see_a_weight_as_out_in(layout, shape, out_in):
    spec = TensorSpec("fc.weight", shape, "bfloat16", layout)
    assert spec.matrix == out_in and spec.is_float
    assert not TensorSpec("fc.weight", shape, "int8", layout).is_float


def test_factors_contain_strength_and_scale():
    a, b = Term("mine", "fc", pair(scale=0.5), strength=4.0).factors
    assert (a.tolist(), b.tolist()) == ([[1], [2], [3]], [[2, 20]])  # (in, rank), 4 * 0.5 * B (rank, out)
    kernel = LoraPair(a=np.ones((1, 2, 3)), b=np.full((4, 1, 1), 2.0), scale=0.5)
    a, b = Term("mine", "conv", kernel, strength=3.0).factors
    assert (a.shape, b.shape, b.ravel().tolist()) == ((1, 2, 3), (4, 1, 1), [3, 3, 3, 3])


@pytest.mark.filterwarnings("error")
def test_factors_beyond_fp32_are_infinite_without_a_warning():
    _, b = Term("mine", "fc", pair(b=[[1e30], [1]]), strength=1e10).factors
    assert np.isinf(b[0, 0]) and b[0, 1] == np.float32(1e10)


def test_the_step_of_one_adapter_has_its_terms_alone():
    one, two = Term("one", "fc", pair()), Term("two", "fc", pair())
    step = Step(matrix("fc.weight"), terms=(one, two))
    alone = step.for_adapter("two")
    assert alone is not None and alone.terms == (two,) and alone.spec is step.spec
    assert step.for_adapter("three") is None


def test_stored_terms_have_the_pairs_of_the_stored_weight():
    (term,) = Step(matrix("fc.weight", 3, 2, layout=Layout.IN_OUT), (Term("mine", "fc", pair()),)).stored_terms
    assert (term.pair.b @ term.pair.a).tolist() == np.transpose(BA).tolist()
    step = Step(matrix("fc.weight"), (Term("mine", "fc", pair()),))
    assert step.stored_terms is step.terms


def test_an_added_tensor_gets_no_prefix_in_the_output():
    added = Step(vector("head.bias"), replace=np.ones(2, np.float32), added=True)
    changed = Step(matrix("fc.weight"), terms=(Term("mine", "fc", pair()),))
    made = Plan((), (), (changed, added), ("norm",), name_prefix="bert.")
    names = [made.output_name(each) for each in (changed, added, "norm")]
    assert names == ["bert.fc.weight", "head.bias", "bert.norm"]
    assert made.by_weight == {"fc.weight": changed, "head.bias": added} and made.low_rank == (changed,)
