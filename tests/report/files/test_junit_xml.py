"""JUnit XML: a test for everything that was checked, in the format that CI servers read."""

from __future__ import annotations

import json
import math
from typing import Any
from xml.etree import ElementTree

import pytest

from lora_export.report.files import junit_xml
from lora_export.report.json_document import document_of_proof
from lora_export.verification.against_checkpoint import Audit, AuditedWeight, Fate
from lora_export.verification.parity import Case, Outcome, Sensitivity, Verdict, judge
from lora_export.verification.proof import Proof
from support import junit_schema
from support.verdicts import DIAGNOSIS, DIFFERENT, NOTHING, ON_CPU, SAME, STRAYED, TRIED, UNDECIDED, case


def parsed(verdict: Verdict, placement: Any = None, **more: Any) -> ElementTree.Element:
    return checked(junit_xml.of_proof(Proof(verdict, placement, **more)))


def checked(text: str) -> ElementTree.Element:
    root = ElementTree.fromstring(text)
    assert root.tag == "testsuites" and junit_schema.faults(root) == []
    return root


@pytest.mark.parametrize(
    ("right", "wrong"),
    {
        ' tests="': ' count="',
        'failures="': 'failures="1',
        "<system-out>": "<system-out><b/>",
        "<property ": "<property kind='' ",
        'time="1.500"': 'time="1.5 s"',
        "<properties>": "<properties>words",
        "</testsuites>": "<testcase name=''/></testsuites>",
    }.items(),
)
def test_schema_of_junit_finds_faults(right: str, wrong: str) -> None:
    text = junit_xml.of_proof(Proof(DIFFERENT, STRAYED, {"torch": "2.13"}, seconds=1.5))
    assert junit_schema.faults(ElementTree.fromstring(text)) == []
    assert right in text
    assert junit_schema.faults(ElementTree.fromstring(text.replace(right, wrong, 1)))


def outcomes(root: ElementTree.Element) -> dict[tuple[str, str], str]:
    found = {}
    for test in root.iter("testcase"):
        marks = [child.tag for child in test if child.tag != "system-out"]
        found[test.attrib["classname"].removeprefix("lora-export."), test.attrib["name"]] = " ".join(marks) or "passed"
    return found


CONTROLS = {
    ("controls", "adapter off: the model without its adapters"): "passed",
    ("controls", "scale × 1.1: the model with every adapter scale × 1.1"): "passed",
}


def test_everything_that_was_checked_has_a_test() -> None:
    root = parsed(SAME, ON_CPU, about={"torch": "2.13"})
    assert outcomes(root) == {
        ("cases", "2 x 300"): "passed",
        ("cases", "1 x 600"): "passed",
        ("outputs.2 x 300", "logits"): "passed",
        ("outputs.1 x 600", "logits"): "passed",
        **CONTROLS,
        ("inputs", "ids"): "passed",
        ("placement", "CPUExecutionProvider"): "passed",
        ("verdict", "same"): "passed",
    }
    for element in (root, root[0]):
        assert [element.attrib[name] for name in ("tests", "failures", "errors")] == ["9", "0", "0"]
    assert (root[0].attrib["skipped"], "skipped" in root.attrib) == ("0", False)
    assert root.find("testsuite/properties/property").attrib == {"name": "torch", "value": "2.13"}  # type: ignore[union-attr]
    output = {test.attrib["classname"]: str(test.findtext("system-out")) for test in root.iter("testcase")}
    assert "error 0.25, allowed 0.25; PyTorch's own error 0.125 (× 2)" in output["lora-export.outputs.2 x 300"]
    assert output["lora-export.cases"] == "compared: logits [2, 300]"
    assert output["lora-export.controls"].splitlines() == [
        "detected in 2 of 2 comparisons",
        "logits in case 2 x 300: detected, off by 6.15",
        "logits in case 1 x 600: detected, off by 6.15",
    ]


def test_suite_and_verdict_have_the_measured_seconds() -> None:
    root = parsed(SAME, ON_CPU, seconds=1.5)
    assert (root.attrib["time"], root[0].attrib["time"]) == ("1.500", "1.500")
    times = {test.attrib["classname"]: test.get("time") for test in root.iter("testcase")}
    assert times.pop("lora-export.verdict") == "1.500"
    assert set(times.values()) == {None}, "what was not timed alone has no time, rather than 0"


def test_different_is_a_failure() -> None:
    root = parsed(DIFFERENT, STRAYED)
    assert outcomes(root) == {
        ("cases", "2 x 300"): "passed",
        ("cases", "bad"): "passed",
        ("outputs.2 x 300", "logits"): "passed",
        ("outputs.bad", "logits"): "failure",
        **CONTROLS,
        ("inputs", "ids"): "passed",
        ("inputs", "mask"): "failure",
        ("placement", "CUDAExecutionProvider"): "failure",
        ("verdict", "same"): "failure",
    }
    assert (root.attrib["failures"], root.attrib["errors"]) == ("4", "0")
    failure = next(root.iter("failure"))
    assert failure.attrib["type"] == "different"
    assert failure.attrib["message"].startswith("logits in case bad: the error is 1, allowed is 0.25")
    assert "the element at [0, 0] is -1, the reference has 0" in str(failure.text)


def test_diagnosis_comes_first_in_the_verdicts_failure() -> None:
    root = parsed(DIFFERENT, diagnosis=DIAGNOSIS)
    failure = root.find("testsuite/testcase[@classname='lora-export.verdict']/failure")
    assert failure is not None
    assert str(failure.text).splitlines()[:2] == [
        "The first module that differs is encoder.1.",
        "its adapter's scale, 2, is applied twice",
    ]


def test_undecided_is_an_error_and_never_passes() -> None:
    found = outcomes(parsed(UNDECIDED))
    assert found["outputs.2 x 300", "logits"] == "passed"
    assert found["controls", "tolerance, adapter off: the model without its adapters"] == "error"
    assert found["verdict", "same"] == "error"
    assert outcomes(parsed(NOTHING)) == {("verdict", "same"): "error"}


def test_different_outweighs_undecided() -> None:
    verdict = judge([case(name="wide"), case(1.0, name="bad")], atol=65.0)
    assert verdict.reasons[0].outcome is Outcome.UNDECIDED
    assert outcomes(parsed(verdict))["verdict", "same"] == "failure"


def test_input_without_effect_is_skipped() -> None:
    verdict = judge([case()], sensitivity=[*TRIED, Sensitivity("mask", False, False)])
    root = parsed(verdict)
    assert outcomes(root)["inputs", "mask"] == "skipped"
    assert root[0].attrib["skipped"] == "1"


def test_missing_output_and_nan_are_failures() -> None:
    nan = case()
    nan.candidate["logits"][0, 3] = math.nan  # type: ignore[index]
    lost = Case(**{**vars(case(name="lost")), "candidate": {}})
    verdict = judge([nan, lost])
    assert verdict.outcome is Outcome.DIFFERENT
    messages = [failure.attrib["message"] for failure in parsed(verdict).iter("failure")]
    assert "the candidate has 1 value not finite, the first at [0, 3]: nan" in messages[0]
    assert messages[1] == "logits in case lost: the candidate lacks this output"
    assert '"figures": null' in json.dumps(document_of_proof(Proof(verdict)), allow_nan=False)


def test_characters_that_xml_cannot_hold_are_replaced() -> None:
    root = parsed(judge([case(output="a\x00\x1b<&\ud800b")]))
    assert ("outputs.2 x 300", "a��<&�b") in outcomes(root)


def test_checkpoint_has_a_test_for_each_tensor_and_the_verdict() -> None:
    right = AuditedWeight("a.weight", Fate.CHANGED, Outcome.SAME)
    wrong = AuditedWeight("b.weight", Fate.KEPT, Outcome.DIFFERENT, "is missing")
    root = checked(junit_xml.of_proof(Audit(Outcome.DIFFERENT, (right, wrong), seconds=2)))
    assert outcomes(root) == {
        ("weights.changed", "a.weight"): "passed",
        ("weights.kept", "b.weight"): "failure",
        ("verdict", "same"): "failure",
    }
    assert [root.attrib[name] for name in ("tests", "failures", "time")] == ["3", "2", "2.000"]


def test_strict_checkpoint_has_no_test_that_passes_as_the_verdict() -> None:
    audit = Audit(
        Outcome.SAME, (AuditedWeight("a.weight", Fate.CHANGED, Outcome.SAME),), not_judged=("the chat template",)
    )
    assert outcomes(checked(junit_xml.of_proof(audit)))["verdict", "same"] == "passed"
    root = checked(junit_xml.of_proof(audit.strictly()))
    assert outcomes(root)["verdict", "same"] == "error"
    assert "not judged: the chat template" in ElementTree.tostring(root, encoding="unicode")
