"""JUnit XML, as GitHub's, GitLab's and Jenkins' test reports read it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from lora_export.report.documents import Placement
from lora_export.report.terminal import placed
from lora_export.verification.against_checkpoint import Audit
from lora_export.verification.parity import (
    CONTROLS,
    DECIDES,
    Comparison,
    Control,
    Outcome,
    Reason,
    Sensitivity,
    Verdict,
)

# XML 1.0 has no escape for these. Compiled where it is used: that takes as long as to import the rest of this file.
NOT_XML = r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"


def junit(
    verdict: Verdict,
    placement: Placement | None = None,
    about: Mapping[str, Any] | None = None,
    *,
    seconds: float = 0.0,
) -> str:
    """The verdict as JUnit XML, as GitHub's and GitLab's test reports read it.

    A test for each case, each output in each case, each control, each input, the placement, and the verdict
    as a whole. `different` is a failure; `undecided` is an error: the test could not be made.
    """
    suite = _suite(about, seconds)
    named = [*(there.case for there in verdict.comparisons), *(reason.case for reason in verdict.reasons)]
    for case in filter(None, dict.fromkeys(named)):
        reasons = [reason for reason in verdict.reasons if reason.case == case and not reason.output]
        _test(suite, "cases", case, reasons, told=_compared(verdict, case))
    for there in verdict.comparisons:
        reasons = [reason for reason in there.reasons if not _of_control(reason)]
        _test(suite, f"outputs.{there.case}", there.output, reasons, told=str(there))
    for name in dict.fromkeys(control.name for there in verdict.comparisons for control in _controls(there)):
        reasons = [reason for reason in verdict.reasons if _of_control(reason) and reason.gate == name]
        _test(suite, "controls", f"{name}: {CONTROLS[name]}", reasons, told=_told(verdict, name))
    for sensitivity in verdict.sensitivity:
        _input_test(suite, sensitivity, verdict.peer)
    if placement is not None:
        strays = [Reason(Outcome.DIFFERENT, "placement", placed(placement))] if placement.off_provider else []
        _test(suite, "placement", placement.requested_provider, strays, told=placed(placement))
    _test(suite, "verdict", "same", verdict.reasons, told=str(verdict))
    return _finished(suite, seconds)


def junit_of_weights(audit: Audit, about: Mapping[str, Any] | None = None, *, seconds: float = 0.0) -> str:
    """A checkpoint's audit as JUnit XML: a test for each tensor."""
    suite = _suite(about, seconds)
    for weight in audit.weights:
        reasons = [] if weight.outcome is Outcome.SAME else [Reason(weight.outcome, weight.fate, str(weight))]
        _test(suite, f"weights.{weight.fate}", weight.name, reasons, told=str(weight))
    return _finished(suite, seconds)


def _suite(about: Mapping[str, Any] | None, seconds: float) -> ElementTree.Element:
    suite = ElementTree.Element("testsuite", name="lora-export", time=f"{seconds:.3f}")
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _flat(about or {}):
        ElementTree.SubElement(properties, "property", name=_xml(name), value=_xml(value))
    return suite


def _finished(suite: ElementTree.Element, seconds: float) -> str:
    suites = ElementTree.Element("testsuites", name="lora-export verify", time=f"{seconds:.3f}")
    suites.append(suite)
    for element in (suites, suite):
        element.set("tests", str(len(suite.findall("testcase"))))
        for what, tag in (("failures", "failure"), ("errors", "error")):
            element.set(what, str(len(suite.findall(f"testcase/{tag}"))))
    suite.set("skipped", str(len(suite.findall("testcase/skipped"))))  # junit-10.xsd has no such thing for the whole
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Facts by dotted names, for a format that knows no others: (`inputs.batch 1.ids`, `[1, 7]`)."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{name}.{number}")
    else:
        yield name, shlex.join(value) if name == "command" else str(value)


def _compared(verdict: Verdict, case: str) -> str:
    there = [comparison for comparison in verdict.comparisons if comparison.case == case]
    compared = [f"{one.output} {list(one.figures.shape)}" for one in there if one.figures]
    return f"compared: {', '.join(compared) or 'nothing'}"


def _of_control(reason: Reason) -> bool:
    return reason.outcome is Outcome.UNDECIDED and reason.gate in CONTROLS


def _controls(there: Comparison) -> Sequence[Control]:
    return there.figures.controls if there.figures else ()


def _told(verdict: Verdict, name: str) -> str:
    put = [(there, control) for there in verdict.comparisons for control in _controls(there) if control.name == name]
    lines = [f"told from the candidate in {sum(control.detected for _, control in put)} of {len(put)} outputs"]
    for there, control in put:
        told = "told" if control.detected else "NOT told" if control.required else "not told, and not asked for"
        lines.append(f"{there.output} in case {there.case}: {told}, off by {control.error:.3g}")
    return "\n".join(lines)


def _test(
    suite: ElementTree.Element, group: str, name: str, reasons: Sequence[Reason], *, told: str
) -> ElementTree.Element:
    test = ElementTree.SubElement(suite, "testcase", classname=_xml(f"lora-export.{group}"), name=_xml(name), time="0")
    if reasons:
        # A difference weighs more than a doubt, and a test has room for one of them.
        worst = next((reason for reason in reasons if reason.outcome is Outcome.DIFFERENT), reasons[0])
        tag = "failure" if worst.outcome is Outcome.DIFFERENT else "error"
        fault = ElementTree.SubElement(test, tag, message=_xml(str(worst)), type=worst.outcome)
        lines = [
            line for reason in reasons for line in (str(reason), reason.remedy and f"  {DECIDES}: {reason.remedy}")
        ]
        fault.text = _xml("\n".join(filter(None, lines)))
    ElementTree.SubElement(test, "system-out").text = _xml(told)
    return test


def _input_test(suite: ElementTree.Element, there: Sensitivity, peer: str) -> None:
    folded = there.peer_changed and not there.candidate_changed
    text = f"perturbing {there.input} changes {peer} and not the candidate: it was folded away"
    reasons = [Reason(Outcome.DIFFERENT, "inputs", text)] if folded else []
    changed = f"{peer} changed: {there.peer_changed}; the candidate changed: {there.candidate_changed}"
    test = _test(suite, "inputs", there.input, reasons, told=changed)
    if not there.peer_changed:
        test.insert(0, ElementTree.Element("skipped", message=f"{peer} does not heed it either"))


def _xml(text: str) -> str:
    return re.sub(NOT_XML, "\N{REPLACEMENT CHARACTER}", text)
