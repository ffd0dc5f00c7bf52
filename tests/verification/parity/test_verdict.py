"""What a verdict prints: its headline, its screen, and its numbers."""

from __future__ import annotations

import numpy as np
import pytest

from lora_export.verification import parity
from lora_export.verification.parity import Findings, Outcome, Sensitivity, judge
from support.parity_cases import COUNT, ERROR, OWN, TRIED, everywhere, make, with_output


@pytest.mark.parametrize(
    ("fraction", "text"),
    [
        (0.0, "0 %"),
        (4.2e-6, "0.00042 %"),
        (4e-7, "0.00004 %"),
        (3e-11, "3e-09 %"),
        (0.1, "10 %"),
        (0.9996, "100 %"),
        (12.34, "1234 %"),
    ],
)
def test_percent_has_two_digits(fraction: float, text: str) -> None:
    assert parity.percent(fraction) == text


@pytest.mark.parametrize(("factor", "text"), [(1.34, "1.3"), (12.34, "12"), (8492.0, "8,492"), (8.49e6, "8.5e+06")])
def test_multiple_has_two_digits_below_ten(factor: float, text: str) -> None:
    assert parity.verdict.multiple(factor) == text


def test_headline_of_same_has_error_and_number_of_cases() -> None:
    cases = [make(), make(error=1.3e-6 * ERROR, name="second"), make(name="third")]
    headline = "same: error 0.00013 % of the adapter's effect, 1.3 × PyTorch's own rounding (limit 2 ×), 3 cases"
    assert judge(cases, sensitivity=TRIED).headline == headline
    assert str(judge(cases, sensitivity=TRIED)).splitlines()[0] == headline


def test_headline_counts_outputs_and_names_half_precision() -> None:
    case = everywhere(make(own=0.01 * OWN, error=0.01 * ERROR, dtype="bfloat16"), mask=np.ones(4, np.int64))
    headline = judge([case], dtype="bfloat16", sensitivity=TRIED).headline
    assert headline.startswith("same: ") and headline.endswith("(limit 3 ×), 2 outputs in 1 case, bfloat16")


def test_headline_has_the_used_limit_where_pytorch_is_exact() -> None:
    exact = make(own=0, error=2.0**-23 * (COUNT % 2))
    assert "71 % of the allowed error, 1 case" in judge([exact]).headline
    assert "4,000 × the allowed error, 1 case" in judge([make(own=0, error=4000 * 2.0**-23)]).headline


def test_headline_has_no_error_where_another_gate_failed() -> None:
    frozen = judge([make()], sensitivity=[*TRIED, Sensitivity("mask", True, False)])
    assert frozen.headline == "different: 1 case"
    assert "× PyTorch's own rounding" in judge([make(error=1e-3 * ERROR)], sensitivity=TRIED).headline
    assert judge([]).headline == "undecided: nothing was compared"


def test_combined_verdict_is_same_where_all_are() -> None:
    right, wrong = judge([make()]), judge([make(error=1e-3 * ERROR)], findings=Findings(notes=("slow",)))
    assert parity.joint_verdict({"base": right, "en": right}).same
    both = parity.joint_verdict({"base": right, "en": wrong})
    assert both.outcome is Outcome.DIFFERENT
    assert {reason.case for reason in both.reasons} == {"en, first"}
    assert both.notes == ("en: slow",)


def test_strict_verdict_is_undecided_where_a_part_was_not_judged() -> None:
    verdict = judge([make()], sensitivity=TRIED, findings=Findings(not_judged=("a rare expert",)))
    assert verdict.same and verdict.not_judged == ("a rare expert",)
    assert verdict.summary.splitlines()[1:] == ["not judged: a rare expert"]
    strict = verdict.strictly()
    assert strict.outcome is Outcome.UNDECIDED and not strict and strict.exit_code == 5
    assert strict.summary.splitlines()[1] == "  - not judged: a rare expert. strict=False accepts that"
    assert str(strict).count("a rare expert") == 1, "once, and not below the reasons again"
    assert judge([make()], sensitivity=TRIED).strictly().same
    wrong = judge([make(error=1e-3 * ERROR)], findings=Findings(not_judged=("a rare expert",))).strictly()
    assert wrong.outcome is Outcome.DIFFERENT


def test_combined_verdict_names_the_role_of_what_was_not_judged() -> None:
    verdicts = {"base": judge([make()]), "en": judge([make()], findings=Findings(not_judged=("a rare expert",)))}
    assert parity.joint_verdict(verdicts).not_judged == ("en: a rare expert",)


def test_verdict_prints_a_screen_and_holds_everything() -> None:
    case = make()
    for number in range(20):
        case = everywhere(case, **{f"mask{number}": np.ones(4, np.int64)})
        case = with_output(case, "candidate", **{f"mask{number}": np.zeros(4, np.int64)})
    verdict = judge([case])
    assert len(verdict.reasons) == 20 and len(verdict.comparisons) == 21
    text = str(verdict)
    assert "and 15 reasons more" in text and "16 outputs more, each farther from its limits" in text
    assert text.startswith("different: 21 outputs in 1 case\n")
