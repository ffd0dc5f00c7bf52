"""All cases together: what was compared, what the adapter reaches, and the inputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lora_export.verification.parity import (
    Case,
    Outcome,
    Sensitivity,
    judge,
)
from support.parity_cases import EFFECT, TRIED, everywhere, failed_gates, integers, make, with_output


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


def test_adapter_without_effect_is_undecided() -> None:
    verdict = judge([make(effect=0 * EFFECT)], sensitivity=TRIED)
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
