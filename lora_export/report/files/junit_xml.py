"""JUnit XML, as the test reports of GitHub, GitLab and Jenkins read it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from lora_export.report.verdict_screen import explanation, placement_lines
from lora_export.verification.against_checkpoint import Audit
from lora_export.verification.parity import (
    CONTROLS,
    DECIDES,
    NOT_JUDGED,
    Comparison,
    Control,
    Outcome,
    Reason,
    Sensitivity,
    Verdict,
    frozen_input,
)

if TYPE_CHECKING:
    from lora_export.verification.proof import Proof

SUFFIX = ".xml"
PURPOSE = "JUnit, for CI"

# Characters that XML 1.0 cannot escape. Compiled where it is used: that takes as long as to import the rest.
NOT_XML = r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"


def of_proof(proof: Proof | Audit) -> str:
    """The verdict as JUnit XML.

    What a model computes has a test for each case, each output in each case, each control, each input, the placement,
    and the verdict as a whole; a checkpoint one for each tensor, and the verdict. `different` is a failure.
    `undecided` is an error: the test could not be made. The duration of the run is the time of the suite and of the
    test of the verdict; the other tests are not timed.
    """
    suite = new_suite(proof.about, proof.seconds)
    test = _weight_tests(suite, proof) if isinstance(proof, Audit) else _output_tests(suite, proof)
    test.set("time", f"{proof.seconds:.3f}")
    return finished_suite(suite, proof.seconds)


def _output_tests(suite: ElementTree.Element, proof: Proof) -> ElementTree.Element:
    """Add the tests of what a model computes. Returns that of the verdict."""
    verdict = proof.verdict
    _case_tests(suite, verdict)
    for comparison in verdict.comparisons:
        reasons = [reason for reason in comparison.reasons if not _is_of_control(reason)]
        _test(suite, f"outputs.{comparison.case}", comparison.output, reasons, output=str(comparison))
    _control_tests(suite, verdict)
    for sensitivity in verdict.sensitivity:
        _input_test(suite, sensitivity, verdict.peer)
    if (placement := proof.placement) is not None:
        where = "\n".join(placement_lines(placement))
        strays = [Reason(Outcome.DIFFERENT, "placement", where)] if placement.off_provider else []
        _test(suite, "placement", placement.requested_provider, strays, output=where)
    lines = explanation(proof)
    return _test(suite, "verdict", "same", verdict.reasons, output=str(verdict), explanation=lines)


def _weight_tests(suite: ElementTree.Element, audit: Audit) -> ElementTree.Element:
    """Add the tests of a checkpoint's tensors. Returns that of the verdict."""
    wrong = []
    for weight in audit.weights:
        reasons = [] if weight.outcome is Outcome.SAME else [Reason(weight.outcome, weight.fate, str(weight))]
        wrong += reasons
        _test(suite, f"weights.{weight.fate}", weight.name, reasons, output=str(weight))
    files = [Reason(Outcome.DIFFERENT, "files", line) for line in audit.files]
    if files:
        _test(suite, "files", "config and tokenizer", files, output="\n".join(audit.files))
    reasons = [*files, *wrong]
    if audit.outcome is Outcome.UNDECIDED and not reasons:  # a strict verdict
        reasons = [Reason(Outcome.UNDECIDED, NOT_JUDGED, f"{NOT_JUDGED}: {part}") for part in audit.not_judged]
    return _test(suite, "verdict", "same", reasons, output=str(audit), explanation=audit.explanation)


def of_error(error: Mapping[str, Any], seconds: float) -> str:
    """An error that ended the command before there was a verdict: the test of the verdict could not be made."""
    suite = new_suite({name: error[name] for name in ("command", "exit", "kind")}, seconds)
    test = ElementTree.SubElement(suite, "testcase", classname="lora-export.verdict", name="same")
    test.set("time", f"{seconds:.3f}")
    message = error["error"]
    fault = ElementTree.SubElement(
        test, "error", message=xml_text(message.partition("\n")[0]), type=xml_text(error["kind"])
    )
    fault.text = xml_text(message)
    return finished_suite(suite, seconds)


# --- The suite ---


def new_suite(about: Mapping[str, Any], seconds: float) -> ElementTree.Element:
    """A suite without tests, with these facts as its properties."""
    suite = ElementTree.Element("testsuite", name="lora-export", time=f"{seconds:.3f}")
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _flat(about):
        ElementTree.SubElement(properties, "property", name=xml_text(name), value=xml_text(value))
    return suite


def finished_suite(suite: ElementTree.Element, seconds: float, name: str = "lora-export verify") -> str:
    """The text of the file: the suite, with its tests counted."""
    suites = ElementTree.Element("testsuites", name=name, time=f"{seconds:.3f}")
    suites.append(suite)
    for element in (suites, suite):
        element.set("tests", str(len(suite.findall("testcase"))))
        for what, tag in (("failures", "failure"), ("errors", "error")):
            element.set(what, str(len(suite.findall(f"testcase/{tag}"))))
    suite.set("skipped", str(len(suite.findall("testcase/skipped"))))  # junit-10.xsd has no such attribute of the whole
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested facts by dotted names: (`inputs.batch 1.ids`, `[1, 7]`)."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{name}.{number}")
    else:
        yield name, shlex.join(value) if name == "command" else str(value)


# --- The tests ---


def _test(
    suite: ElementTree.Element,
    group: str,
    name: str,
    reasons: Sequence[Reason],
    *,
    output: str,
    explanation: Sequence[str] = (),
) -> ElementTree.Element:
    test = ElementTree.SubElement(suite, "testcase", classname=xml_text(f"lora-export.{group}"), name=xml_text(name))
    if reasons:
        # `different` outweighs `undecided`, and a test has one message.
        worst = next((reason for reason in reasons if reason.outcome is Outcome.DIFFERENT), reasons[0])
        tag = "failure" if worst.outcome is Outcome.DIFFERENT else "error"
        fault = ElementTree.SubElement(test, tag, message=xml_text(str(worst)), type=worst.outcome)
        lines = [
            line for reason in reasons for line in (str(reason), reason.remedy and f"  {DECIDES}: {reason.remedy}")
        ]
        fault.text = xml_text("\n".join([*explanation, *filter(None, lines)]))
    ElementTree.SubElement(test, "system-out").text = xml_text(output)
    return test


def _case_tests(suite: ElementTree.Element, verdict: Verdict) -> None:
    cases = [*(comparison.case for comparison in verdict.comparisons), *(reason.case for reason in verdict.reasons)]
    for case in filter(None, dict.fromkeys(cases)):
        reasons = [reason for reason in verdict.reasons if reason.case == case and not reason.output]
        compared = [f"{one.output} {list(f.shape)}" for one, f in verdict.measured if one.case == case]
        _test(suite, "cases", case, reasons, output=f"compared: {', '.join(compared) or 'nothing'}")


def _control_tests(suite: ElementTree.Element, verdict: Verdict) -> None:
    by_name: dict[str, list[tuple[Comparison, Control]]] = {}
    for comparison, figures in verdict.measured:
        for control in figures.controls:
            by_name.setdefault(control.name, []).append((comparison, control))
    for name, controls in by_name.items():
        kind = CONTROLS[name]
        reasons = [reason for reason in verdict.reasons if _is_of_control(reason) and reason.gate == name]
        _test(suite, "controls", f"{kind.title}: {kind.model}", reasons, output="\n".join(_control_lines(controls)))


def _control_lines(controls: Sequence[tuple[Comparison, Control]]) -> Iterator[str]:
    yield f"detected in {sum(control.detected for _, control in controls)} of {len(controls)} comparisons"
    for comparison, control in controls:
        detected = (
            "detected" if control.detected else "NOT detected" if control.required else "not detected, as allowed"
        )
        yield f"{comparison.output} in case {comparison.case}: {detected}, off by {control.error:.3g}"


def _is_of_control(reason: Reason) -> bool:
    return reason.outcome is Outcome.UNDECIDED and reason.gate in CONTROLS


def _input_test(suite: ElementTree.Element, sensitivity: Sensitivity, peer: str) -> None:
    reasons = []
    if sensitivity.is_frozen:
        reasons.append(Reason(Outcome.DIFFERENT, "inputs", frozen_input(sensitivity, peer)))
    changed = f"{peer} changed: {sensitivity.peer_changed}; the candidate changed: {sensitivity.candidate_changed}"
    test = _test(suite, "inputs", sensitivity.input, reasons, output=changed)
    if not sensitivity.peer_changed:
        test.insert(0, ElementTree.Element("skipped", message=f"the input does not change {peer}'s outputs either"))


def xml_text(text: str) -> str:
    """The text, with a mark for each character that XML cannot hold."""
    return re.sub(NOT_XML, "\N{REPLACEMENT CHARACTER}", text)
