"""Adapters combined by name, and within a plan; what is refused by name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lora_export import plan
from lora_export.adapters.combine import combine_adapters, combine_in_plan
from lora_export.errors import InputRefused
from lora_export.lora import Adapter, LoraPair, TokenRows
from lora_export.options.combining import Combination
from lora_export.plan import Layout, TensorSpec


def adapter(name: str, value: float, *modules: str) -> Adapter:
    pair = LoraPair(np.array([[1, value]]), np.array([[1], [value], [0]]), scale=1.0)
    return Adapter(name, "peft", dict.fromkeys(modules or ("fc", "up"), pair), sha256=name, metadata={"task_type": "X"})


ONE, TWO = adapter("one", 2), adapter("two", 3, "fc", "down")
LINEAR = Combination("linear")
SPECS = [TensorSpec(f"{name}.weight", (3, 2), "float32", Layout.OUT_IN) for name in ("fc", "up", "down")]


def test_one_pair_for_each_module_of_any_adapter() -> None:
    combined = combine_adapters([ONE, TWO], [1.0, 2.0], Combination(), "both")
    assert {module: pair.rank for module, pair in combined.pairs.items()} == {"fc": 2, "up": 1, "down": 1}
    expected = ONE.pairs["fc"].delta() + 2 * TWO.pairs["fc"].delta()
    np.testing.assert_array_equal(combined.pairs["fc"].delta(), expected)
    np.testing.assert_array_equal(combined.pairs["down"].delta(), 2 * TWO.pairs["down"].delta())
    assert (combined.name, combined.metadata["task_type"]) == ("both", "X")


def test_a_plan_has_one_term_for_each_weight() -> None:
    steps = plan.make([ONE, TWO], SPECS, strengths=[1.0, 4.0])
    combined = combine_in_plan(steps, LINEAR)
    first = combined.by_weight["fc.weight"]
    assert len(first.terms) == 1 and [len(step.terms) for step in steps.steps] == [2, 1, 1]
    a, b = np.array([[1, 2]]) + 2 * np.array([[1, 3]]), np.array([[1], [2], [0]]) + 2 * np.array([[1], [3], [0]])
    assert first.terms[0].pair.delta().tolist() == (b @ a).tolist()
    assert "linear of 1 * B A (rank 1, one) and 4 * B A (rank 1, two)" in str(combined)
    assert "combined by linear, as PEFT does: not the exact sum" in str(combined)
    assert combined.adapters == (ONE, TWO) and combined.strengths == (1.0, 4.0)


def test_the_exact_sum_needs_no_other_plan() -> None:
    steps = plan.make([ONE, TWO], SPECS)
    assert combine_in_plan(steps, Combination()) is steps


DORA = replace(ONE, pairs={"fc": replace(ONE.pairs["fc"], magnitude=np.ones(3, np.float32))})
BARE = replace(ONE, pairs={"fc": replace(ONE.pairs["fc"], as_stored=True)})
ROWS = replace(ONE, token_rows={"t.weight": TokenRows(np.array([1]), np.ones((1, 2)))})


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (DORA, "one: fc has DoRA's magnitude"),
        (BARE, "one: fc is a bare parameter"),
        (replace(ONE, replaced={"head.weight": np.ones(2)}), "one: head.weight is saved whole"),
        (
            replace(ONE, biases={"fc": np.ones(3, np.float32), "up": np.ones(3, np.float32)}),
            r"fc \(and 1 more\) has a bia",
        ),
        (ROWS, "one: t.weight has trained rows"),
        (replace(ONE, tied={"up": "fc"}), "one: up is tied to the input embeddings"),
        (replace(ONE, pairs={}, replaced={"head.weight": np.ones(2)}), "it has no pair"),
    ],
)
def test_more_than_pairs_is_refused_by_name(first: Adapter, message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        combine_adapters([first, TWO], [], Combination(), "both")
    steps = replace(plan.make([ONE, TWO], SPECS), adapters=(first, TWO))
    with pytest.raises(InputRefused, match=message):
        combine_in_plan(steps, LINEAR)


@pytest.mark.parametrize(
    ("second", "weights", "message"),
    [
        (TWO, [1.0], "2 adapters but 1 weights"),
        (TWO, [1.0, 0.0], "two has no effect: its weight is 0"),
        (TWO, [1.0, float("inf")], "must be a finite number"),
        (adapter("two", 0, "other"), [], None),
        (replace(TWO, sha256="one"), [], "two is the same adapter as one"),
        (replace(TWO, name="one"), [], "2 adapters are called one"),
    ],
)
def test_adapters_that_cannot_be_meant_are_refused(second: Adapter, weights: list[float], message: str | None) -> None:
    if message is None:
        assert combine_adapters([ONE, second], weights, Combination(), "both").pairs
        return
    with pytest.raises(InputRefused, match=message):
        combine_adapters([ONE, second], weights, Combination(), "both")


def test_one_adapter_alone_needs_no_method() -> None:
    assert combine_adapters([ONE], [2.0], Combination(), "x").pairs["fc"].delta().tolist() == [[2, 4], [4, 8], [0, 0]]
    with pytest.raises(InputRefused, match="combines several adapters, and there is one"):
        combine_adapters([ONE], [], LINEAR, "x")
    with pytest.raises(InputRefused, match="combines several adapters, and there is one"):
        combine_in_plan(plan.make([ONE], SPECS[:2]), LINEAR)


def test_weights_that_cannot_be_combined_are_named() -> None:
    wide = LoraPair(np.ones((2, 2)), np.ones((3, 2)), scale=1.0)
    with pytest.raises(InputRefused, match=r"1 of 3 weights cannot be combined by linear.*\n.*fc: the pairs have diff"):
        combine_adapters([ONE, replace(TWO, pairs={**TWO.pairs, "fc": wide})], [], LINEAR, "both")


def test_layouts_that_contradict_each_other_are_refused() -> None:
    stored = [replace(one, layouts={"fc": layout}) for one, layout in ((ONE, "in_out"), (TWO, "out_in"))]
    with pytest.raises(InputRefused, match="fc: two was trained on a weight that is stored as out_in"):
        combine_adapters(stored, [], Combination(), "both")


def test_targets_are_those_of_all_adapters_or_unknown() -> None:
    known = [replace(ONE, targets=("fc", "up")), replace(TWO, targets=("fc", "down"))]
    assert combine_adapters(known, [], Combination(), "both").targets == ("down", "fc", "up")
    assert combine_adapters([known[0], TWO], [], Combination(), "both").targets == ()
