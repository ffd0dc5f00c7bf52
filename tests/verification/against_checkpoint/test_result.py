"""The result of an audit: fates, the worst weights, the text."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lora_export.lora import TokenRows
from lora_export.plan import Step, Term
from lora_export.verification.against_checkpoint.result import Audit, AuditedWeight, Fate
from lora_export.verification.parity import Findings, Outcome
from support.plans import matrix, pair, vector

RIGHT = AuditedWeight(
    "fc.weight", Fate.CHANGED, Outcome.SAME, error=0.5, controls={"ad left out": True, "ad x 1.1": True}
)
KEPT = AuditedWeight("norm.weight", Fate.KEPT, Outcome.SAME)


def wrong(name: str, off: int = 1, outcome: Outcome = Outcome.DIFFERENT, error: float = 1.0) -> AuditedWeight:
    return AuditedWeight(name, Fate.CHANGED, outcome, "it is off", off=off, error=error)


def test_the_fate_follows_from_the_step() -> None:
    term = Term("ad", "fc", pair())
    whole, rows = np.ones((2, 3), np.float32), TokenRows(np.array([1]), np.ones((1, 3), np.float32))
    for step, fate in [
        (None, Fate.KEPT),
        (Step(matrix("fc.weight"), terms=(term,)), Fate.CHANGED),
        (Step(matrix("fc.weight"), terms=(term,), replace=whole), Fate.CHANGED),
        (Step(vector("fc.bias"), shift=np.ones(2, np.float32)), Fate.CHANGED),
        (Step(matrix("fc.weight"), replace=whole), Fate.REPLACED),
        (Step(matrix("fc.weight"), token_rows=rows), Fate.REPLACED),
    ]:
        assert Fate.of(step) is fate


@pytest.mark.parametrize(("outcome", "code"), [(Outcome.SAME, 0), (Outcome.DIFFERENT, 4), (Outcome.UNDECIDED, 5)])
def test_an_audit_is_true_only_where_it_is_the_same(outcome: Outcome, code: int) -> None:
    audit = Audit(outcome, ())
    assert (bool(audit), audit.exit_code) == (code == 0, code)


def test_what_is_found_of_files_is_added() -> None:
    first = Findings(("a note",), ("c.json",), faults=("a.json: it is missing",))
    more = Findings(("more",), ("d.json",), faults=("b.json: other values",))
    audit = Audit(Outcome.SAME, (KEPT,)).with_files(first).with_files(more)
    assert audit.outcome is Outcome.DIFFERENT and audit.files == ("a.json: it is missing", "b.json: other values")
    assert (audit.not_judged, audit.notes) == (("c.json", "d.json"), ("a note", "more"))
    assert Audit(Outcome.UNDECIDED, (KEPT,)).with_files(Findings()).outcome is Outcome.UNDECIDED


def test_the_worst_weights_are_the_different_ones() -> None:
    undecided = wrong("u", 9, Outcome.UNDECIDED)
    audit = Audit(Outcome.DIFFERENT, (RIGHT, undecided, wrong("a", 1), wrong("b", 7), wrong("c", 7, error=2.0)))
    assert [weight.name for weight in audit.worst] == ["c", "b", "a", "u"]


def test_a_right_audit_prints_its_margin_and_its_controls() -> None:
    higher = dataclasses.replace(RIGHT, name="up.weight", error=0.75, controls={"ad left out": True})
    assert str(Audit(Outcome.SAME, (RIGHT, higher, KEPT))).splitlines() == [
        "same: 3 of 3 tensors are as they should be: 1 kept, 2 changed",
        "largest error against W + s·BA in fp64: 0.75 of what is allowed, in up.weight",
        "detected as wrong: 3 controls (an adapter left out, scaled or transposed)",
    ]
    assert str(Audit(Outcome.SAME, (KEPT,))) == "same: 1 of 1 tensor is as it should be: 1 kept"


def test_a_wrong_audit_prints_eight_weights_and_the_number_of_the_others() -> None:
    weights = tuple(wrong(f"w{number}", 20 - number) for number in range(11))
    lines = str(Audit(Outcome.DIFFERENT, weights, recorded=("It contains another adapter.",))).splitlines()
    assert lines[:3] == [
        "different: 0 of 11 tensors are as they should be",
        "  It contains another adapter.",
        "  w0: different, it is off",
    ]
    assert lines[-2:] == ["  w7: different, it is off", "  and 3 more"]
    assert "more" not in str(Audit(Outcome.DIFFERENT, weights[:8]))


def test_a_name_cannot_look_like_another_line() -> None:
    assert str(dataclasses.replace(KEPT, name="a\nsame: \x1b[2J")) == "a\\nsame: \\x1b[2J: same"
