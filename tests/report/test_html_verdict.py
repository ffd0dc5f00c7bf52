"""What the HTML report of a verdict shows, computed from its JSON document."""

from __future__ import annotations

from typing import Any

from lora_export.report.html_verdict import verdict_context
from lora_export.report.json_document import document_of_proof
from lora_export.verification.parity import Verdict, judge
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
