"""Sentences that several reports share: the headline, what ran where, what explains a verdict."""

from __future__ import annotations

import dataclasses

from lora_export.errors import escaped_lines
from lora_export.report.sentences import diagnosis_lines, explanation, headline, placement_lines
from lora_export.verification.against_checkpoint import Audit
from lora_export.verification.diagnose.diagnosis import Diagnosis
from lora_export.verification.parity import Outcome
from lora_export.verification.proof import Proof
from support.verdicts import NOTHING, ON_CPU, SAME, STRAYED, a_placement


def test_the_headline_has_the_verdict_and_where_it_ran() -> None:
    assert headline(Proof(SAME)) == SAME.headline
    assert headline(Proof(SAME, ON_CPU)) == f"{SAME.headline}, CPU 142/142 nodes"
    assert headline(Proof(NOTHING, STRAYED)) == "undecided: nothing was compared, CUDA 141/142 nodes"
    audit = Audit(Outcome.SAME, ())
    assert headline(audit) == str(audit).splitlines()[0]


def test_nodes_that_ran_elsewhere_are_listed_up_to_five() -> None:
    assert placement_lines(ON_CPU) == ["142 of 142 compute nodes on CPUExecutionProvider"]
    assert placement_lines(STRAYED) == [
        "141 of 142 compute nodes on CUDAExecutionProvider",
        "  - /layer.141/MatMul (MatMul) on CPUExecutionProvider",
    ]
    five, six = (placement_lines(a_placement("CUDAExecutionProvider", compute=9, elsewhere=count)) for count in (5, 6))
    assert len(five) == 6 and five[-1] == "  - /layer.8/MatMul (MatMul) on CPUExecutionProvider"
    assert len(six) == 7 and six[-2:] == ["  - /layer.7/MatMul (MatMul) on CPUExecutionProvider", "  - and 1 more"]


def test_an_explanation_begins_with_the_record_of_the_candidate() -> None:
    why = escaped_lines("its scale is applied twice", "", "3 of 3 modules were compared")
    recorded = dataclasses.replace(SAME, recorded=("It contains another adapter.",))
    assert explanation(Proof(recorded, diagnosis=Diagnosis("encoder.1", why))) == [
        "It contains another adapter.",
        "The first module that differs is encoder.1.",
        "its scale is applied twice",
        "3 of 3 modules were compared",
    ]
    assert explanation(Proof(SAME)) == []
    assert diagnosis_lines(None, "all agree") == ["No compared module differs.", "all agree"]
