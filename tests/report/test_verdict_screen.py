"""The terminal: what was measured is on one screen, whole, and nothing in a name controls the terminal."""

from __future__ import annotations

import dataclasses

import pytest

from lora_export.errors import escaped_lines
from lora_export.report.verdict_screen import (
    diagnosis_lines,
    explanation,
    headline,
    placement_lines,
    print_verdict,
    screen,
)
from lora_export.verification.against_checkpoint import Audit
from lora_export.verification.diagnose.diagnosis import Diagnosis
from lora_export.verification.parity import Outcome, Verdict, judge
from lora_export.verification.proof import Proof
from support.screens import printed
from support.verdicts import DIAGNOSIS, DIFFERENT, NOTHING, ON_CPU, SAME, STRAYED, UNDECIDED, a_placement, case


def test_screen_has_headline_figures_and_placement() -> None:
    text = printed(print_verdict, Proof(SAME, ON_CPU))
    assert text.splitlines()[0] == (
        "same: error 0.39 % of the adapter's effect, 2 × PyTorch's own rounding (limit 2 ×), 2 cases, CPU 142/142 nodes"
    )
    assert "\nlogits in case 2 x 300: float32 [2, 300], within its limits\n" in text
    assert "  error 0.25, allowed 0.25; PyTorch's own error 0.125 (× 2)\n" in text
    assert "  worst element [0, 0]: off by 0.25; PyTorch is off by at most 0.125\n" in text
    assert "    the candidate has -0.25, the reference 0\n" in text
    assert "  the error is 0.39 % of the adapter's effect (64)\n" in text
    assert text.endswith("142 of 142 compute nodes on CPUExecutionProvider\n")


def test_narrow_pipe_cuts_no_line_and_has_no_colour() -> None:
    text = printed(print_verdict, Proof(SAME, ON_CPU), width=10)
    assert "\x1b" not in text and "…" not in text
    assert text.splitlines() == screen(Proof(SAME, ON_CPU)).splitlines()
    assert text.splitlines()[1:] == [*str(SAME).splitlines()[1:], *placement_lines(ON_CPU)]


@pytest.mark.parametrize(("verdict", "colour"), [(SAME, "32"), (DIFFERENT, "31"), (UNDECIDED, "33")])
def test_terminal_shows_the_outcome_in_colour(verdict: Verdict, colour: str) -> None:
    text = printed(print_verdict, Proof(verdict), terminal=True)
    assert text.startswith(f"\x1b[1;{colour}m{verdict.outcome}\x1b[0m: ")
    assert text.count(f"\x1b[{colour}m  - ") == len(verdict.reasons)


def test_screen_shows_the_reasons_and_the_diagnosis() -> None:
    text = printed(print_verdict, Proof(DIFFERENT, diagnosis=DIAGNOSIS))
    assert "  - logits in case bad: the error is 1, allowed is 0.25; PyTorch's own error is 0.125 (× 8)\n" in text
    frozen = "changing the input mask changes PyTorch's outputs and not the candidate's: to the candidate this input"
    assert f"  - {frozen} is a constant\n" in text
    assert "encoder.1\n  its adapter's scale, 2, is applied twice\n" in text
    assert printed(print_verdict, Proof(NOTHING)).startswith(
        "undecided: nothing was compared\n  - nothing was compared: there is no case"
    )


def test_nodes_on_another_provider_are_listed() -> None:
    text = printed(print_verdict, Proof(SAME, STRAYED))
    assert "2 cases, CUDA 141/142 nodes\n" in text
    assert "141 of 142 compute nodes on CUDAExecutionProvider\n" in text
    assert text.endswith("  - /layer.141/MatMul (MatMul) on CPUExecutionProvider\n")


def test_names_are_neither_markup_nor_terminal_commands() -> None:
    text = printed(print_verdict, Proof(judge([case(output="[red]\x1b[2J[/red]")])), terminal=True)
    assert "[red]\\x1b[2J[/red] in case" in text
    assert "\x1b[2J" not in text


# --- Sentences that several reports share: the headline, what ran where, what explains a verdict. ---


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
