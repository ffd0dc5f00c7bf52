"""Adapters combined by name, and within a plan; what is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft.utils import merge_utils

from lora_export import plan
from lora_export.adapters import combine as ours
from lora_export.adapters.combine import combine_adapters, combine_in_plan, combined_pair
from lora_export.errors import InputRefused, WrongUsage
from lora_export.lora import Adapter, LoraPair, TokenRows
from lora_export.options.combining import Combination
from lora_export.pairs.structured import HadamardPair, WholePair
from lora_export.plan import Layout, TensorSpec, Term


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


def with_table(adapter: Adapter, value: float, module: str = "fc") -> Adapter:
    return replace(adapter, replaced={f"{module}.weight": np.full((3, 2), value, np.float32)})


def test_a_table_that_all_save_beside_their_pairs_stays() -> None:
    """PEFT saves the base's table of embeddings that it adapts."""
    both = [with_table(ONE, 7), with_table(TWO, 7)]
    combined = combine_adapters(both, [1.0, 2.0], LINEAR, "both")
    assert {name: value.tolist() for name, value in combined.replaced.items()} == {"fc.weight": [[7, 7]] * 3}
    steps = combine_in_plan(plan.make(both, SPECS, strengths=[1.0, 2.0]), LINEAR)
    changed = steps.by_weight["fc.weight"]
    assert changed.replace is not None and changed.replace.tolist() == [[7, 7]] * 3 and len(changed.terms) == 1
    np.testing.assert_array_equal(combined.pairs["fc"].delta(), changed.terms[0].pair.delta())


@pytest.mark.parametrize(
    "second", [TWO, with_table(TWO, 8), with_table(adapter("two", 3, "down"), 8), with_table(TWO, 7, "up")]
)
def test_tables_that_not_all_have_are_refused(second: Adapter) -> None:
    with pytest.raises(InputRefused, match=r"(fc|up)\.weight is saved whole"):
        combine_adapters([with_table(ONE, 7), second], [], LINEAR, "both")


@pytest.mark.parametrize(
    ("second", "weights", "message"),
    [
        (TWO, [1.0], "2 adapters but 1 weight"),
        (TWO, [1.0, 0.0], "two has no effect: its weight is 0"),
        (TWO, [1.0, float("inf")], "must be a finite number"),
        (TWO, [1.0, -1e39], r"is -1e\+39; it must be a finite number in float32"),
        (adapter("two", 0, "other"), [], None),
        (replace(TWO, sha256="one"), [], "two is the same adapter as one"),
        (replace(TWO, name="one"), [], "2 adapters are called one"),
        (replace(TWO, flattened=True), [], "some of the adapters `_` stands for the dots"),
    ],
)
def test_adapters_that_cannot_be_meant_are_refused(second: Adapter, weights: list[float], message: str | None) -> None:
    if message is None:
        assert combine_adapters([ONE, second], weights, Combination(), "both").pairs
        return
    with pytest.raises((InputRefused, WrongUsage), match=message):
        combine_adapters([ONE, second], weights, Combination(), "both")


def test_names_without_dots_find_the_layers_of_their_sum() -> None:
    flat = [replace(one, pairs={"a_fc": one.pairs["fc"]}, flattened=True) for one in (ONE, TWO)]
    combined = combine_adapters(flat, [], LINEAR, "both")
    assert plan.make([combined], [TensorSpec("a.fc.weight", (3, 2), "float32", Layout.OUT_IN)]).by_weight


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


# --- One pair of several: by hand for the exact sum and for `linear`, and what does not go together. ---


NUMBERS = {"one": 0, "two": 1}


def term(adapter: str, a: Any, b: Any, scale: float = 1.0, strength: float = 1.0, **kind: bool) -> Term:
    return Term(adapter, "fc", LoraPair(np.array(a), np.array(b), scale, **kind), strength)


FIRST_TERM = term("one", [[1, 2]], [[1], [3]], scale=4.0)
SECOND_TERM = term("two", [[5, 0]], [[0], [2]], scale=2.0, strength=-2.0)


def test_cat_is_the_sum_of_the_changes() -> None:
    pair = combined_pair(Combination("cat"), [FIRST_TERM, SECOND_TERM], NUMBERS, 1)
    assert (pair.a.tolist(), pair.b.tolist(), pair.scale) == ([[4, 8], [-20, 0]], [[1, 0], [3, 2]], 1.0)
    assert pair.delta().tolist() == [[4, 8], [12 - 40, 24]]


def test_linear_sums_the_factors_and_has_cross_terms() -> None:
    pair = combined_pair(
        Combination("linear"), [FIRST_TERM, SECOND_TERM], NUMBERS, 1
    )  # roots of weight · scale: 2, and 2 with A negative
    assert (pair.a.tolist(), pair.b.tolist()) == ([[-8, 4]], [[2], [10]])
    assert pair.delta().tolist() == [[-16, 8], [-80, 40]]


def test_svd_cuts_the_exact_sum_to_the_largest_rank() -> None:
    pair = combined_pair(Combination("svd"), [FIRST_TERM, SECOND_TERM], NUMBERS, 1)
    exact = np.array([[4, 8], [-28, 24]])
    left = np.linalg.svd(exact)[1][1]
    assert pair.rank == 1 and np.linalg.norm(pair.delta() - exact) == pytest.approx(left, rel=1e-5)
    whole = combined_pair(Combination("svd", svd_rank=2), [FIRST_TERM, SECOND_TERM], NUMBERS, 1)
    np.testing.assert_allclose(whole.delta(), exact, atol=1e-5)


def test_a_seed_determines_what_dare_keeps() -> None:
    wide = [term(name, np.ones((2, 40)), np.ones((30, 2))) for name in NUMBERS]
    pairs = [combined_pair(Combination("dare_linear", 0.5, seed=seed), wide, NUMBERS, 2) for seed in (0, 0, 1)]
    assert np.array_equal(pairs[0].a, pairs[1].a) and not np.array_equal(pairs[0].a, pairs[2].a)
    assert np.array_equal(pairs[0].a, combined_pair(Combination("dare_linear", 0.5), wide, NUMBERS, 2).a)


@pytest.mark.parametrize(
    ("method", "others", "message"),
    [
        ("linear", term("two", [[1, 2], [0, 1]], [[1, 0], [0, 1]]), r"different ranks: 1 \(one\), 2 \(two\)"),
        ("cat", term("two", [[1, 2, 3]], [[1], [0]]), "different kinds or shapes"),
        ("svd", term("two", [[1, 2]], [[1], [0]], embedding=True), "different kinds or shapes"),
        ("magnitude_prune_svd", term("two", [[1, 2]], [[1], [0]], scale=3e38, strength=10), "float32 cannot hold"),
        ("svd", term("two", [[1, 2]], [[1], [0]], scale=3e38, strength=10), "float32 cannot hold"),
        ("svd", Term("two", "m", WholePair({"change": np.eye(2)}, 3e38), 10), "float32 cannot hold"),
        ("linear", term("two", [[3e38, 2]], [[1], [0]], scale=1e6), "not finite"),
    ],
)
def test_pairs_that_do_not_go_together_are_refused(method: str, others: Term, message: str) -> None:
    combination = Combination(method, 0.5 if "prune" in method else None)
    with pytest.raises(InputRefused, match=message):
        combined_pair(combination, [FIRST_TERM, others], NUMBERS, 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "sum"}, "method= is 'sum'; it must be cat, linear"),
        ({"method": "ties"}, "needs density="),
        ({"method": "ties", "density": 0.0}, "above 0 and at most 1"),
        ({"method": "ties", "density": float("nan")}, "above 0 and at most 1"),
        ({"method": "linear", "density": 0.5}, 'density=: combination="linear" does not use it'),
        ({"method": "dare_linear", "density": 0.5, "majority_sign": "total"}, "majority_sign=: "),
        ({"method": "ties", "density": 0.5, "majority_sign": "all"}, "must be total or frequency"),
        ({"method": "ties", "density": 0.5, "seed": 1, "svd_rank": 2}, "svd_rank= and seed=: "),
        ({"method": "svd", "svd_rank": 0}, "at least 1"),
    ],
)
def test_options_that_a_method_does_not_use_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(WrongUsage, match=message):
        Combination(**values)


def test_the_record_has_what_was_used() -> None:
    assert Combination().settings == {}
    assert Combination("dare_ties", 0.5).settings == {
        "combine": {"method": "dare_ties", "density": 0.5, "majority_sign": "total", "seed": 0}
    }
    assert str(Combination("dare_ties", 0.5, seed=3)) == "dare_ties (majority_sign total, seed 3, density 0.5)"


@pytest.mark.parametrize(("shape", "kernel"), [((5, 4), 2), ((9, 4), 1)])
def test_the_sum_with_a_loha_is_no_larger_than_the_change(shape: tuple[int, int], kernel: int) -> None:
    rng = np.random.default_rng(0)
    out, inner = shape
    factors = {"a1": (3, inner, kernel), "b1": (out, 3), "a2": (4, inner, kernel), "b2": (out, 4)}
    loha = HadamardPair({name: rng.standard_normal(size) for name, size in factors.items()}, 0.5)
    plain = LoraPair(rng.standard_normal((2, inner, kernel)), rng.standard_normal((out, 2, 1)), 3.0)
    terms = [Term("one", "m", loha, 2.0), Term("two", "m", plain, -1.0)]
    expected = 2 * loha.delta().astype(np.float64) - plain.delta()
    found = combined_pair(Combination(), terms, NUMBERS, 12)
    assert found.rank == min(out, inner * kernel) and found.scale == 1
    np.testing.assert_allclose(found.delta(), expected, atol=1e-5)
    svd = combined_pair(Combination("svd", svd_rank=3), terms, NUMBERS, 12)
    values = np.linalg.svd(expected.reshape(out, -1))[1]
    assert np.linalg.norm(svd.delta() - expected) == pytest.approx(np.sqrt(np.sum(values[3:] ** 2)), rel=1e-4)


def test_a_method_of_factors_refuses_a_change_that_has_none() -> None:
    loha = HadamardPair({name: np.ones((2, 3) if name[0] == "a" else (3, 2)) for name in ("a1", "b1", "a2", "b2")}, 1.0)
    terms = [Term("one", "m", loha, 1.0), Term("two", "m", loha, 1.0)]
    with pytest.raises(InputRefused, match=r"HadamardPair \(one\), HadamardPair \(two\): ties combines A with A and"):
        combined_pair(Combination("ties", density=0.5), terms, NUMBERS, 4)


# --- Sums, elected signs and removed entries, by hand and against PEFT's functions. ---


FIRST = np.array([[4, -1, 0], [2, 3, -5]], np.float32)
SECOND = np.array([[-1, -2, 7], [2, -4, 1]], np.float32)
WEIGHTS = np.array([0.5, 2], np.float32)
ARRAYS = np.random.default_rng(1).normal(size=(3, 40, 30)).astype(np.float32)


def test_a_weighted_sum() -> None:
    assert ours.weighted_sum([FIRST, SECOND], WEIGHTS).tolist() == [[0, -4.5, 14], [5, -6.5, -0.5]]


def test_values_of_the_elected_sign_are_averaged() -> None:
    # Signs of the sums: + - +; + - -. Zero agrees with no sign. Weights do not vote.
    assert ours.elected_mean([FIRST, SECOND], WEIGHTS, "total").tolist() == [[2, -2.25, 14], [2.5, -8, -2.5]]
    # Most signs: a draw counts as positive.
    assert ours.elected_mean([FIRST, SECOND], WEIGHTS, "frequency").tolist() == [[2, -2.25, 14], [2.5, 1.5, 2]]


def test_the_largest_entries_stay() -> None:
    assert ours.largest_entries(FIRST, 0.5).tolist() == [[4, 0, 0], [0, 3, -5]]
    assert ours.largest_entries(FIRST, 0.1).tolist() == np.zeros((2, 3)).tolist()
    assert ours.largest_entries(FIRST, 1.0) is FIRST
    assert ours.largest_entries(np.ones((1, 4), np.float32), 0.5).tolist() == [[1, 1, 0, 0]]


def test_random_entries_stay_and_are_rescaled() -> None:
    found = ours.random_entries(ARRAYS[0], 0.25, "key")
    kept = found != 0
    assert 0.2 < kept.mean() < 0.3
    np.testing.assert_array_equal(found[kept], ARRAYS[0][kept] / np.float32(0.25))
    assert ours.random_entries(FIRST, 1.0, "key") is FIRST


def test_a_key_determines_the_random_entries() -> None:
    # Frozen: another mask would give another adapter for the seed that a user has recorded.
    assert ours.kept_at_random((2, 4), 0.5, "0/1/layer/A").astype(int).tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    one, other = (ours.kept_at_random((50, 50), 0.5, key) for key in ("0/1/layer/A", "1/1/layer/A"))
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.07, 0.5, 0.93])
def test_ties_is_that_of_peft(method: str, density: float) -> None:
    weights = np.array([1.5, -0.5, 0.25], np.float32)
    expected = merge_utils.ties([torch.from_numpy(one) for one in ARRAYS], torch.from_numpy(weights), density, method)
    found = ours.elected_mean([ours.largest_entries(one, density) for one in ARRAYS], weights, method)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6, atol=1e-7)
    assert (found != 0).mean() > density / 2
