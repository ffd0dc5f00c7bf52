"""Tied tensors in a plan: copies of the names that a base lacks, which of them are needed, and changes of all names."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from lora_export import plan
from lora_export.errors import InputRefused, MatchError
from lora_export.lora import Adapter, LoraPair, TokenRows
from lora_export.plan import Layout, Plan, TensorSpec, Tied, Ties
from lora_export.plan.match_names import Prefix
from lora_export.plan.ties import shared, with_rows_of_all_names

TABLE, HEAD = "model.embed.weight", "head.weight"
BASE = (
    TensorSpec(TABLE, (5, 3), "float32", Layout.MATRIX),
    TensorSpec("model.fc.weight", (3, 3), "float32", Layout.OUT_IN),
)
A, B = np.array([[1.0, 2, 3]]), np.array([[1.0], [0], [2], [0], [1]])  # of a linear layer: (1, 3) and (5, 1)
LINEAR, EMBEDDING = LoraPair(A, B, 2.0), LoraPair(B.T * 10, A.T, 1.0, embedding=True)


def adapter(**pairs: LoraPair) -> Adapter:
    names = {"head": "head", "embed": "model.embed", "fc": "model.fc"}
    return Adapter("one", "peft", {names[name]: pair for name, pair in pairs.items()})


def made(one: Adapter, handling: Tied, **how: Any) -> Plan:
    return plan.make([one], BASE, ties=Ties(handling, {HEAD: TABLE}, **how))


def changes(found: Plan) -> dict[str, list[list[float]]]:
    """ΔW of each weight as it is stored."""
    return {
        step.weight: sum(term.pair.delta(strength=term.strength) for term in step.stored_terms).tolist()
        for step in found.steps
    }


def test_an_untied_head_changes_alone() -> None:
    found = made(adapter(head=LINEAR), Tied.UNTIE)
    assert changes(found) == {HEAD: (2 * B @ A).tolist()}
    assert found.untied == {HEAD: TABLE} and TABLE in found.kept and HEAD not in found.kept
    assert found.tied is Tied.UNTIE
    assert found.notes == (f"{HEAD} is no longer tied to {TABLE}: it gets a tensor of its own.",)


def test_an_untied_table_leaves_the_head_a_copy() -> None:
    found = made(adapter(embed=EMBEDDING), Tied.UNTIE)
    assert changes(found) == {TABLE: (10 * B @ A).tolist()}
    assert found.untied == {HEAD: TABLE}


def test_nothing_is_untied_where_no_tied_tensor_changes_alone() -> None:
    rows = TokenRows(np.array([1]), np.ones((1, 3), np.float32))
    tied = Adapter(
        "one", "peft", {"model.embed": EMBEDDING, "head": EMBEDDING.transposed}, tied={"head": "model.embed"}
    )
    for one in (adapter(fc=LoraPair(A, A.T, 1.0)), Adapter("one", "peft", {}, token_rows={TABLE: rows}), tied):
        found = made(one, Tied.UNTIE)
        assert not found.untied and all(step.weight != HEAD for step in found.steps)


def rows_of(**indices: int) -> Adapter:
    """An adapter that replaces one row of each table."""
    names = {"head": HEAD, "embed": TABLE}
    values = np.ones((1, 3), np.float32)
    rows = {names[name]: TokenRows(np.array([index]), values) for name, index in indices.items()}
    return Adapter("one", "peft", {}, token_rows=rows)


@pytest.mark.parametrize(
    ("handling", "given", "expected"),
    [
        (Tied.UNTIE, {"embed": 1}, {TABLE: [1]}),  # PEFT trains these for both, which stay tied
        (Tied.UNTIE, {"head": 1}, {HEAD: [1]}),
        (Tied.UNTIE, {"embed": 1, "head": 2}, {TABLE: [1], HEAD: [2]}),
        (Tied.UNTIE, {"embed": 1, "head": 1}, {TABLE: [1]}),
        (Tied.BOTH, {"embed": 1}, {TABLE: [1]}),
        (Tied.BOTH, {"head": 1}, {TABLE: [1]}),
    ],
)
def test_no_row_of_a_tied_table_is_lost(handling: Tied, given: dict[str, int], expected: dict[str, list[int]]) -> None:
    found = made(rows_of(**given), handling)
    rows = {step.weight: step.token_rows.indices.tolist() for step in found.steps if step.token_rows is not None}
    assert rows == expected
    assert bool(found.untied) is (HEAD in expected)


def test_rows_of_a_table_beside_another_table_with_two_kinds() -> None:
    """The other one's head has rows of its own, at other indices."""
    other = {name: TokenRows(np.array([row]), np.ones((1, 3), np.float32)) for name, row in (("a", 1), ("b", 2))}
    both = dataclasses.replace(rows_of(embed=1), token_rows=other | dict(rows_of(embed=1).token_rows))
    ties = Ties(Tied.UNTIE, {"b": "a", HEAD: TABLE})
    assert with_rows_of_all_names(both, ties, Prefix()).token_rows.keys() == {"a", "b", TABLE, HEAD}


def test_a_head_with_values_of_its_own_changes_alone() -> None:
    base = [*BASE, TensorSpec(HEAD, (5, 3), "float32", Layout.OUT_IN)]
    ties = Ties(Tied.BOTH, {HEAD: TABLE}, stored=frozenset({HEAD}), has_other_values=lambda name: name == HEAD)
    assert changes(plan.make([adapter(head=LINEAR)], base, ties=ties)) == {HEAD: (2 * B @ A).tolist()}


@pytest.mark.parametrize("order", [1, -1])
def test_a_whole_head_beside_rows_of_another_adapter_is_refused(order: int) -> None:
    rows, whole = rows_of(embed=1), Adapter("two", "peft", {}, replaced={HEAD: np.zeros((5, 3), np.float32)})
    ties = Ties(tensors={HEAD: TABLE}, by_config=True)
    with pytest.raises(
        InputRefused, match=f"one replaces rows of {TABLE}, and so of {HEAD}, .*; two replaces the whole"
    ):
        plan.make([rows, whole][::order], BASE, ties=ties, may_add=True)
    own = dataclasses.replace(whole, token_rows=rows.token_rows)  # the head is the adapter's own
    assert not plan.make([own], BASE, ties=ties, may_add=True).by_weight[HEAD].token_rows


def test_rows_are_those_of_a_tied_head_that_is_stored_again() -> None:
    base = [*BASE, TensorSpec(HEAD, (5, 3), "float32", Layout.MATRIX)]
    for again, expected in (({HEAD}, {TABLE, HEAD}), ((), {TABLE})):
        ties = Ties(tensors={HEAD: TABLE}, by_config=True, stored=frozenset(again))
        assert plan.make([rows_of(embed=1)], base, ties=ties).by_weight.keys() == expected


def test_an_untied_head_with_a_pair_has_the_rows_of_its_table() -> None:
    one = dataclasses.replace(adapter(head=LINEAR), token_rows=rows_of(embed=1).token_rows)
    with pytest.raises(MatchError, match=f"replaces rows of {HEAD}, and adds to it: no merge does both"):
        made(one, Tied.UNTIE)


@pytest.mark.parametrize(
    ("how", "way"),
    [
        ({}, 'Use tied="untie"'),
        ({"bound": "T5 stays tied"}, "Nor can they be untied: T5 stays tied"),
        ({"takes_more": False}, 'Use tied="untie", in a merge into the checkpoint of which the file was made'),
    ],
)
def test_different_rows_of_tied_tables_cannot_change_as_one(how: dict[str, Any], way: str) -> None:
    with pytest.raises(InputRefused, match=f"it replaces other rows of each. {way}$"):
        made(rows_of(embed=1, head=2), Tied.BOTH, **how)


@pytest.mark.parametrize(
    ("takes_more", "way"),
    [(True, "trained"), (False, "trained, in a merge into the checkpoint of which the file was made")],
)
def test_rows_of_one_of_two_tables_are_refused_with_the_ways_out(takes_more: bool, way: str) -> None:
    how: dict[str, Any] = {"has_other_values": lambda _: True, "stored": frozenset({HEAD}), "takes_more": takes_more}
    head = TensorSpec(HEAD, (5, 3), "float32", Layout.OUT_IN)
    with pytest.raises(InputRefused, match=f'as the adapter was {way}; tied="both" changes both'):
        plan.make([rows_of(embed=1)], [*BASE, head], ties=Ties(Tied.ERROR, {HEAD: TABLE}, **how))


def test_both_sums_the_changes_of_both_in_the_shared_tensor() -> None:
    found = made(adapter(head=LINEAR, embed=EMBEDDING), Tied.BOTH)
    assert changes(found) == {TABLE: (12 * B @ A).tolist()}
    assert not found.untied
    assert changes(made(adapter(head=LINEAR), Tied.BOTH)) == {TABLE: (2 * B @ A).tolist()}


def test_both_gives_each_tensor_of_a_module_its_kind_of_pair() -> None:
    one = shared(adapter(head=LINEAR), Ties(Tied.BOTH, {HEAD: TABLE}), Prefix(), {TABLE})
    assert [one.pairs[name].embedding for name in ("model.embed", "head")] == [True, False]
    np.testing.assert_array_equal(one.pairs["model.embed"].delta().T, one.pairs["head"].delta())
    assert dict(one.tied) == {"head": "model.embed"}


def test_a_whole_head_replaces_the_shared_table() -> None:
    value = np.arange(15, dtype=np.float32).reshape(5, 3)
    found = made(Adapter("one", "peft", {}, replaced={HEAD: value}), Tied.BOTH)
    (step,) = found.steps
    assert step.weight == TABLE and step.replace is not None and step.replace.tolist() == value.tolist()


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"pairs": {"head": LoraPair(A, B, 1.0, magnitude=np.ones(5))}}, "DoRA rescales a weight"),
        (
            {"pairs": {"head": LINEAR}, "replaced": {TABLE: np.ones((5, 3))}},
            "replaces one of them, and adds to another",
        ),
        ({"pairs": {}, "replaced": {TABLE: np.ones((5, 3)), HEAD: np.zeros((5, 3))}}, "by different values"),
    ],
)
def test_what_no_sum_expresses_is_refused(changed: dict[str, Any], why: str) -> None:
    with pytest.raises(InputRefused, match=why) as refused:
        made(Adapter("one", "peft", **changed), Tied.BOTH)
    assert 'Use tied="untie"' in str(refused.value)
    assert made(Adapter("one", "peft", **changed), Tied.UNTIE).steps


def test_one_value_of_a_config_unties_all_groups() -> None:
    base = [*BASE, TensorSpec("bias", (5,), "float32")]
    ties = {HEAD: TABLE, "head.bias": "bias"}
    for by_config, more in ((True, {"head.bias": "bias"}), (False, {})):
        found = plan.make([adapter(head=LINEAR)], base, ties=Ties(Tied.UNTIE, ties, by_config=by_config))
        assert found.untied == {HEAD: TABLE, **more}


def test_without_a_decision_a_head_has_no_weight() -> None:
    with pytest.raises(MatchError, match="the base has no weight for head"):
        plan.make([adapter(head=LINEAR)], BASE, ties=Ties())
