"""What the HTML report of a checkpoint's audit shows, computed from its JSON document."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lora_export.report.files.page import html_page
from lora_export.report.html_checkpoint import checkpoint_context
from lora_export.report.json_document import document_of_proof
from lora_export.verification.against_checkpoint import Audit, AuditedWeight, Fate
from lora_export.verification.parity import Outcome

SUM = AuditedWeight(
    "a", Fate.CHANGED, Outcome.SAME, elements=10, error=0.25, controls={"left out": True, "× 1.1": False},
    relative_change=0.125, retention=0.75, noise=0.5,
)  # fmt: skip
WRONG = dataclasses.replace(SUM, name="b", outcome=Outcome.DIFFERENT, error=12.0, relative_change=0.25, retention=0.5)
KEPT = AuditedWeight("c", Fate.KEPT, Outcome.SAME, elements=40)


def context(*weights: AuditedWeight) -> dict[str, Any]:
    return checkpoint_context(document_of_proof(Audit(Outcome.SAME, weights)))


def test_the_first_numbers_are_the_extremes_of_all_weights() -> None:
    assert context(SUM, KEPT)["tiles"] == [
        ("2 of 2", "tensors are as they should be"),
        ("25 %", "of the limit was used, at most"),
        ("75 %", "of a change was retained, at least"),
        ("12 %", "of a weight was changed, at most"),
        ("1 of 2", "wrong sums were detected"),
    ]
    tiles = {meaning: number for number, meaning in context(SUM, WRONG)["tiles"]}
    assert tiles["of the limit was used, at most"] == "× 12" and tiles["of a change was retained, at least"] == "50 %"
    assert context(KEPT)["tiles"] == [("1 of 1", "tensors are as they should be")]


def test_wrong_weights_come_first() -> None:
    undecided = dataclasses.replace(KEPT, name="d", outcome=Outcome.UNDECIDED)
    shown = context(SUM, undecided, WRONG)
    assert [weight["name"] for weight in shown["wrong"]] == ["b", "d"]
    assert [weight["name"] for weight in shown["changed"]] == ["b", "a"]


def test_a_bar_shows_the_used_part_of_the_limit() -> None:
    endless = dataclasses.replace(SUM, name="e", error=math.inf)
    bars = {weight["name"]: (weight["used"], weight["width"]) for weight in context(SUM, WRONG, endless)["changed"]}
    assert bars == {"a": (0.25, 25.0), "b": (12.0, 100.0), "e": (math.inf, 100.0)}


def test_a_missed_wrong_sum_names_its_weights() -> None:
    left_out, scaled = context(SUM, WRONG)["controls"]
    assert left_out == {"control": "left out", "detected": 2, "compared": 2, "matches": [], "missed": []}
    assert scaled == {"control": "× 1.1", "detected": 0, "compared": 2, "matches": ["b"], "missed": ["a"]}


def test_fates_are_counted() -> None:
    kept, changed = context(KEPT, dataclasses.replace(KEPT, name="k"), SUM, WRONG)["fates"]
    assert kept == {"name": "as in the base", "all": 2, "right": 2, "elements": 80, "outcome": "undecided"}
    assert changed == {
        "name": "changed by adapters", "all": 2, "right": 1, "elements": 20, "outcome": "different",
    }  # fmt: skip


def test_what_was_not_judged_is_on_the_page() -> None:
    audit = Audit(
        Outcome.SAME,
        (KEPT,),
        not_judged=("the <chat> template",),
        notes=("not compared: notes.txt",),
        about={"candidate": "merged", "base": "base", "adapters": [], "seconds": 1.0, "created": "today"},
    )
    page = html_page(document_of_proof(audit))
    assert "<b>Not judged:</b> the &lt;chat&gt; template" in page and "<li>not compared: notes.txt</li>" in page
