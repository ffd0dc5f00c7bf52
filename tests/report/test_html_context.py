"""What the HTML report of a verdict shows, computed from its JSON document."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from lora_export.report import html_context
from lora_export.report.files.page import html_page
from lora_export.report.html_context import checkpoint_context, verdict_context
from lora_export.report.json_document import document_of_proof
from lora_export.verification.against_checkpoint import Audit, AuditedWeight, Fate
from lora_export.verification.parity import Outcome, Verdict, judge
from lora_export.verification.proof import Proof
from support.verdicts import AS_DOCUMENT, DIFFERENT, NOTHING, ON_CPU, SAME, STRAYED, UNDECIDED, case


def context(verdict: Verdict, placement: Any = None, diagnosis: Any = None) -> dict[str, Any]:
    return verdict_context(document_of_proof(Proof(verdict, placement, diagnosis=diagnosis)))


def test_the_first_numbers_are_the_largest_of_all_cases() -> None:
    assert context(SAME, ON_CPU)["tiles"] == [
        ("1 × 2", "outputs × cases compared"),
        ("0.39 %", "largest error, relative to the adapter's effect"),  # 1/4 of 64
        ("× 2", "PyTorch's own error, at most"),  # 1/4 beside 1/8
        ("142 of 142", "compute nodes on CPUExecutionProvider"),
    ]
    tiles = {meaning: number for number, meaning in context(DIFFERENT)["tiles"]}
    assert tiles["largest error, relative to the adapter's effect"] == "1.6 %"  # 1 of 64
    assert tiles["PyTorch's own error, at most"] == "× 8"
    assert ("141 of 142", "compute nodes on CUDAExecutionProvider") in context(SAME, STRAYED)["tiles"]
    assert context(NOTHING)["tiles"] == [("0 × 0", "outputs × cases compared")]


def test_a_reason_is_listed_once_with_its_number_of_cases() -> None:
    both = context(judge([case(1.0, name="a"), case(1.0, name="b")]))["reasons"]
    one = context(judge([case(name="a"), case(1.0, name="b")]))["reasons"]
    assert {reason["cases"] for reason in both} == {2} and {reason["cases"] for reason in one} == {1}
    assert [reason["gate"] for reason in both] == [reason["gate"] for reason in one]


def test_a_remedy_that_follows_itself_is_shown_once() -> None:
    document = document_of_proof(Proof(UNDECIDED))
    (reason,) = document["reasons"][:1]
    document["reasons"] = [{**reason, "gate": gate} for gate in ("one", "two")] + [{**reason, "output": "other"}]
    shown = verdict_context(document)["reasons"]
    assert reason["remedy"] and [r["remedy"] for r in shown] == ["", reason["remedy"], reason["remedy"]]


def test_an_output_has_its_cases_and_their_gates() -> None:
    (output,) = context(DIFFERENT)["outputs"]
    right, wrong = output["cases"]
    assert (output["name"], output["dtype"], output["elements"]) == ("logits", "float32", 1200)
    assert output["has_effect"] and not output["has_loss"]
    error = {gate["name"]: gate for gate in right["gates"]}["error"]
    assert (error["title"], error["used"], error["width"], error["passed"]) == ("rmse", 1.0, 100.0, True)
    assert {gate["name"]: gate["used"] for gate in wrong["gates"]}["error"] == 4.0
    assert context(NOTHING)["outputs"] == []


def test_a_limit_of_zero_is_a_full_bar_or_none() -> None:
    document = document_of_proof(Proof(SAME))
    document["comparisons"][0]["figures"]["gates"] = [
        {"name": "exact", "value": value, "allowed": 0.0, "passed": not value} for value in (0.0, 3.0)
    ]
    gates = verdict_context(document)["outputs"][0]["cases"][0]["gates"]
    assert [(gate["title"], gate["used"], gate["width"]) for gate in gates] == [
        ("values that differ", None, 0.0),
        ("values that differ", None, 100.0),
    ]


def test_controls_are_counted_and_the_missed_ones_are_named() -> None:
    adapter_off, scaled = context(SAME)["controls"]
    assert (adapter_off["title"], adapter_off["detected"], adapter_off["compared"]) == ("adapter off", 2, 2)
    assert (scaled["title"], scaled["missed"]) == ("scale × 1.1", [])
    missed = [control["missed"] for control in context(UNDECIDED)["controls"]]
    assert {(control["output"], control["case"]) for found in missed for control in found} == {("logits", "2 x 300")}


def test_a_control_that_need_not_be_detected_is_not_missed() -> None:
    document = document_of_proof(Proof(SAME))
    for comparison, required in zip(document["comparisons"], (True, False), strict=True):
        for control in comparison["figures"]["controls"]:
            control.update(detected=False, required=required)
    missed = [control["missed"] for control in verdict_context(document)["controls"]]
    assert [[control["case"] for control in found] for found in missed] == [["2 x 300"], ["2 x 300"]]


def test_the_explanation_is_the_record_and_the_diagnosis() -> None:
    assert context(SAME)["explanation"] == [] and context(SAME)["layers"] == []
    document = document_of_proof(Proof(DIFFERENT, diagnosis=AS_DOCUMENT)) | {
        "recorded": ["It contains another adapter."]
    }
    shown = verdict_context(document)
    assert shown["explanation"][:2] == ["It contains another adapter.", "The first module that differs is encoder.1."]
    assert shown["layers"]


# --- What every HTML report shows: facts in one line, factors, bars, adapters, files. ---


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"),
        (True, "yes"),
        (False, "no"),
        (3, "3"),
        ("cpu", "cpu"),
        ([2, 300], "2 x 300"),
        (["a", None], "a, none"),
        ({"ids": [2, 7], "mask": True}, "ids 2 x 7, mask yes"),
        ([], ""),
    ],
)
def test_a_fact_is_one_line_of_text(value: Any, text: str) -> None:
    assert html_context.inline(value) == text


@pytest.mark.parametrize(
    ("factor", "text"), [(1.3449, "× 1.34"), (0.5, "× 0.5"), (999, "× 999"), (8494, "× 8,490"), (1e6, "× 1,000,000")]
)
def test_a_factor_has_three_digits(factor: float, text: str) -> None:
    assert html_context.times(factor) == text


@pytest.mark.parametrize(("used", "width"), [(0.5, 50.0), (0.0, 2.0), (1.0, 100.0), (17.0, 100.0), (0.33333, 33.3)])
def test_a_bar_is_full_at_the_limit_and_never_invisible(used: float, width: float) -> None:
    assert html_context.bar_width(used) == width


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["adapter"], "its adapter"),
        (["english"], "its adapter “english”"),
        (["en", "fr"], "its adapters “en” and “fr”"),
        (["en", "fr", "de"], "its adapters “en”, “fr” and “de”"),
        (["en", "adapter"], "its 2 adapters"),
    ],
)
def test_adapters_are_named_where_the_name_is_one(names: list[str], text: str) -> None:
    assert html_context.with_adapters([{"name": name} for name in names]) == text


@pytest.mark.parametrize(
    ("candidate", "name"), [("out/merged", "merged"), ({"path": "out/model.onnx"}, "model.onnx"), ({}, "")]
)
def test_the_candidate_is_called_by_its_file_name(candidate: Any, name: str) -> None:
    assert html_context.candidate_name({"candidate": candidate}) == name


def test_a_run_without_facts_has_no_candidate_adapters_or_files() -> None:
    assert html_context.candidate_name({}) == ""
    assert html_context.adapters_of({}) == html_context.adapters_of({"adapters": "english"}) == []
    assert html_context.adapters_of({"adapters": [{"name": "en"}, "fr"]}) == [{"name": "en"}]
    assert html_context.files({"candidate": "merged", "model": "base"}) == []


def test_every_file_that_was_read_is_listed_with_its_hash() -> None:
    about = {
        "candidate": {"path": "m.onnx", "sha256": {"m.onnx": "aa", "m.data": "bb"}},
        "model": {"source": "base", "sha256": "cc"},
        "adapters": [{"name": "en", "sha256": "dd", "weight": 1}, {"name": "fr", "sha256": "ee", "weight": 0.25}],
    }
    assert html_context.files(about) == [
        ("candidate", "m.onnx", "aa"),
        ("candidate", "m.data", "bb"),
        ("model's weights", "base", "cc"),
        ("adapter", "en", "dd"),
        ("adapter, × 0.25", "fr", "ee"),
    ]


def test_facts_leave_out_what_is_shown_elsewhere() -> None:
    about = {"candidate": "m", "model": "b", "command": [], "created": "today", "inputs": {}, "adapters": [], "seed": 3}
    assert html_context.facts(about) == [("seed", "3")]


# --- What the HTML report of a checkpoint's audit shows, computed from its JSON document. ---


SUM = AuditedWeight(
    "a", Fate.CHANGED, Outcome.SAME, elements=10, error=0.25, controls={"left out": True, "× 1.1": False},
    relative_change=0.125, retention=0.75, noise=0.5,
)  # fmt: skip
WRONG = dataclasses.replace(SUM, name="b", outcome=Outcome.DIFFERENT, error=12.0, relative_change=0.25, retention=0.5)
KEPT = AuditedWeight("c", Fate.KEPT, Outcome.SAME, elements=40)


def audit_context(*weights: AuditedWeight) -> dict[str, Any]:
    return checkpoint_context(document_of_proof(Audit(Outcome.SAME, weights)))


def test_the_first_numbers_are_the_extremes_of_all_weights() -> None:
    assert audit_context(SUM, KEPT)["tiles"] == [
        ("2 of 2", "tensors are as they should be"),
        ("25 %", "of the limit was used, at most"),
        ("75 %", "of a change was retained, at least"),
        ("12 %", "of a weight was changed, at most"),
        ("1 of 2", "wrong sums were detected"),
    ]
    tiles = {meaning: number for number, meaning in audit_context(SUM, WRONG)["tiles"]}
    assert tiles["of the limit was used, at most"] == "× 12" and tiles["of a change was retained, at least"] == "50 %"
    unmeasured = dataclasses.replace(SUM, relative_change=None)
    assert audit_context(SUM, unmeasured)["tiles"][1:] == audit_context(SUM, KEPT)["tiles"][1:]
    assert audit_context(KEPT)["tiles"] == [("1 of 1", "tensors are as they should be")]


def test_wrong_weights_come_first() -> None:
    undecided = dataclasses.replace(KEPT, name="d", outcome=Outcome.UNDECIDED)
    shown = audit_context(SUM, undecided, WRONG)
    assert [weight["name"] for weight in shown["wrong"]] == ["b", "d"]
    assert [weight["name"] for weight in shown["changed"]] == ["b", "a"]


def test_a_bar_shows_the_used_part_of_the_limit() -> None:
    endless = dataclasses.replace(SUM, name="e", error=math.inf)
    bars = {
        weight["name"]: (weight["used"], weight["width"]) for weight in audit_context(SUM, WRONG, endless)["changed"]
    }
    assert bars == {"a": (0.25, 25.0), "b": (12.0, 100.0), "e": (math.inf, 100.0)}


def test_a_missed_wrong_sum_names_its_weights() -> None:
    left_out, scaled = audit_context(SUM, WRONG)["controls"]
    assert left_out == {"control": "left out", "detected": 2, "compared": 2, "matches": [], "missed": []}
    assert scaled == {"control": "× 1.1", "detected": 0, "compared": 2, "matches": ["b"], "missed": ["a"]}


def test_fates_are_counted() -> None:
    kept, changed = audit_context(KEPT, dataclasses.replace(KEPT, name="k"), SUM, WRONG)["fates"]
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
