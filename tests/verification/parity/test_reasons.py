"""The reasons in words: what is wrong, what could not be decided, and a remedy in numbers."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from lora_export.verification.parity import Case, Outcome, Reason, Sensitivity, judge
from support.parity_cases import EFFECT, ERROR, OWN, TRIED, everywhere, failed_gates, integers, make, with_output

SMALL = 1e-6  # rms of PyTorch's own error


def reasons(*arguments: object, atol: float | None = None, **fields: object) -> dict[str, Reason]:
    verdict = judge([make(*arguments, **fields)], sensitivity=TRIED, atol=atol)  # type: ignore[arg-type]
    return {reason.gate: reason for reason in verdict.reasons}


def test_an_error_is_told_beside_the_limit_and_pytorchs_own() -> None:
    found = reasons(error=0.5 * ERROR, own=0.0625 * OWN, effect=4.0 * EFFECT)["error"]
    assert (found.outcome, found.case, found.output, found.remedy) == (Outcome.DIFFERENT, "first", "y", "")
    assert found.text == "the error is 0.5, allowed is 0.125; PyTorch's own error is 0.0625 (× 8)"


def test_a_candidate_that_is_a_control_is_said_to_match_it() -> None:
    found = reasons(error=-EFFECT)
    assert {reason.outcome for reason in found.values()} == {Outcome.DIFFERENT}
    without = found["error"].text
    assert without.endswith(". The candidate matches the model without its adapters")
    scaled = reasons(error=0.1 * EFFECT)["error"].text
    assert scaled.endswith(". The candidate matches the model with every adapter scale × 1.1")
    assert "matches" not in reasons(error=0.5 * ERROR)["error"].text


def test_one_wrong_element_is_named_with_both_values() -> None:
    spike = SMALL * ERROR
    spike[512] = 1e-4
    text = reasons(error=spike)["tail"].text
    assert re.match(
        r"the element at \[512\] is 1\.0001\S*, the reference has 1: off by 0\.0001, PyTorch is off by", text
    )


def test_a_tolerance_that_is_exceeded_is_told_with_its_numbers() -> None:
    found = reasons(error=0.5 * ERROR, own=0.5 * OWN, effect=64 * EFFECT, atol=0.25)["tolerance"]
    assert (found.outcome, found.remedy) == (Outcome.DIFFERENT, "")
    assert found.text == "outside the tolerance: max(|candidate - reference| - rtol · |reference|) is 0.5, atol is 0.25"


def test_an_error_near_the_effect_leaves_doubt_and_a_remedy() -> None:
    found = reasons(error=0.125 * ERROR, own=0.125 * OWN, effect=0.25 * EFFECT)
    assert {reason.outcome for reason in found.values()} == {Outcome.UNDECIDED}
    assert found["effect"].text.startswith("the error 0.125 is 50 % of the adapter's effect (0.25). Above 10 %, ")
    (factor,) = re.findall(r"an adapter with (\S+) times the effect on this output", found["effect"].remedy)
    enough = reasons(error=0.125 * ERROR, own=0.125 * OWN, effect=0.25 * float(factor.replace(",", "")) * EFFECT)
    assert enough == {}, "an adapter with this effect is decided"


def test_numbers_without_squares_have_a_remedy() -> None:
    size = 2.0**600
    found = reasons(
        0.125 * size * OWN, 0.125 * size * ERROR, 0.25 * size * EFFECT, dtype="float64", truth=size * np.ones(len(OWN))
    )
    assert "times the effect on this output" in found["effect"].remedy


def test_a_wide_tolerance_is_named_with_one_that_decides() -> None:
    found = reasons(effect=64 * EFFECT, atol=100.0)["tolerance"]
    assert (
        found.outcome is Outcome.UNDECIDED
        and "passes the tolerance: it is wider than the adapter's effect (64)" in found.text
    )
    (atol,) = re.findall(r"an atol= below (\S+) with rtol=0", found.remedy)
    assert reasons(effect=64 * EFFECT, atol=float(atol) / 2) == {}


def test_a_difference_leaves_no_doubts() -> None:
    found = reasons(error=0.25 * ERROR, own=0.001 * OWN, effect=0.5 * EFFECT)
    assert {reason.outcome for reason in found.values()} == {Outcome.DIFFERENT} and "effect" not in found


@pytest.mark.parametrize("error", [0.0, 1e-7])
def test_a_right_candidate_has_no_reasons(error: float) -> None:
    assert reasons(error=error * np.ones_like(ERROR)) == {}


# --- whole set ---


def test_nothing_compared_is_undecided() -> None:
    nothing: dict[str, np.ndarray] = {}
    empty = make(own=[], error=[], effect=[])
    for cases in ([], [Case("first", "", nothing, nothing, nothing, nothing, nothing)], [empty]):
        verdict = judge(cases)
        assert verdict.outcome is Outcome.UNDECIDED
        assert "nothing was compared" in str(verdict)


def test_empty_case_or_output_is_undecided() -> None:
    hollow = everywhere(make(name="second"), y=np.empty(0, np.float32))
    assert [(r.gate, r.case, r.output) for r in judge([make(), hollow]).reasons] == [("nothing", "second", "")]
    case = everywhere(make(), past=np.empty((2, 0), np.float32))
    assert [(r.gate, r.case, r.output) for r in judge([case]).reasons] == [("nothing", "", "past")]
    filled = everywhere(make(name="second"), past=np.ones((2, 1), np.float32))
    assert judge([case, filled]).same


@pytest.mark.parametrize("size", [0, 2.0**-51])  # below the rounding of the reference
def test_adapter_without_effect_is_undecided(size: float) -> None:
    verdict = judge([make(effect=size * EFFECT)], sensitivity=TRIED)
    assert verdict.outcome is Outcome.UNDECIDED
    assert [reason.gate for reason in verdict.reasons] == ["effect"]
    assert "the adapter changes no output in any case" in str(verdict)


@pytest.mark.fault(45)
def test_zero_against_zero_is_undecided() -> None:
    zero = np.zeros(1024)
    assert judge([make(own=0, error=0, effect=zero, truth=zero)]).outcome is Outcome.UNDECIDED
    unadapted = replace(make(own=0, error=0, effect=zero, truth=zero), base=None, scaled=None)
    assert failed_gates(unadapted) == ["values_1.01"]


def test_unreached_output_is_noted_and_still_judged() -> None:
    case = everywhere(make(), mask=np.ones(4, np.int64))
    hidden = np.linspace(1, 2, 600)
    for run in ("reference", "base", "scaled"):
        case = with_output(case, run, hidden=hidden)
    for run in ("deployed", "candidate"):
        case = with_output(case, run, hidden=hidden.astype(np.float32))
    verdict = judge([case], sensitivity=TRIED)
    assert verdict.same
    assert verdict.notes == ("the adapter does not reach mask, hidden: the effect gate was not applied there",)
    broken = with_output(case, "candidate", hidden=(hidden + 1e-3).astype(np.float32))
    assert failed_gates(broken) == ["error", "tail"]


def test_integers_decide_only_where_each_control_changes_some() -> None:
    case = integers([1, 2, 3], [1, 2, 3], [1, 2, 3], [9, 9, 9])
    assert failed_gates(replace(case, scaled=case.reference)) == ["scale_1.1"]
    assert judge([replace(case, scaled=case.reference), replace(case, name="second")]).same
    assert failed_gates(replace(case, base=None, scaled=None)) == []


@pytest.mark.fault(45)
def test_frozen_input_is_different() -> None:
    verdict = judge([make()], sensitivity=[*TRIED, Sensitivity("mask", True, False)])
    assert verdict.outcome is Outcome.DIFFERENT
    assert "changing the input mask changes PyTorch's outputs and not the candidate's" in str(verdict)


def test_input_without_effect_is_noted() -> None:
    ignored = Sensitivity("mask", False, False)
    verdict = judge([make()], sensitivity=[*TRIED, ignored])
    assert verdict.same and "the input mask does not change PyTorch's outputs" in verdict.notes[0]
    assert judge([make()], sensitivity=[ignored]).outcome is Outcome.UNDECIDED, "a constant"
